"""A defense from an SAE: pictures to fit on, the choice of latents, blocks and scopes, the report."""
