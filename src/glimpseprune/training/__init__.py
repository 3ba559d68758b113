"""LightningModules: one file per stage, each defining ``Stage``; and what they share."""
