"""The architecture sweep: adapt, train, merge, save and load a tiny model of every family that can be built here."""
