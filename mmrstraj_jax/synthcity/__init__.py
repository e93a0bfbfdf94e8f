"""SynthCity: a seeded city in metres whose images, truth and text come from one model of the world."""
