"""An SAE from residuals."""
