"""The model that ships with the package: weights, the world it was made for, and the code that rebuilds all of it."""
