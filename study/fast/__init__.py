"""The fast paths of training and scoring on a GPU, with their mathematics in README.md."""
