"""What latents are and did, shown: catalogues, reports, counterfactuals."""
