"""The demo: write a word on a picture, and see which answer falls and what the defense removed. `defense demo`."""
