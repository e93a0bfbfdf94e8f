"""The factory of the two data sets: trips, imagery, language-model calls. Nothing here needs JAX."""
