"""The formula on tensors: an SAE, a set of latents, and what their edit takes from a residual."""
