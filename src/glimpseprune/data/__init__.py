"""Data: raw datasets become Samples (sources/), Samples become tar shards and back (shards.py), a batch of Samples
becomes Inputs (collate.py), and a folder of shards becomes an exactly resumable stream of batches (stream.py), which a
Lightning trainer takes as module.py."""
