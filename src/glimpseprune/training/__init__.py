"""LightningModules: a file per stage, whose module is its ``Stage``; the tiny base's pretraining; what they share."""
