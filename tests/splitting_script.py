"""`python splitting_script.py FOLDER STRATEGY OUT`: two processes load a backbone; each writes OUT.<rank> with how many
numbers it holds, how many there are, and the sum of the embeddings as all of them see it."""

import json
import sys

import lightning as L

from glimpseprune import backbones, sharded
from glimpseprune.running import strategies

if __name__ == "__main__":
    folder, name, out = sys.argv[1:]
    strategy = strategies.build(name)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    with strategies.splitting(trainer):
        model = backbones.load(folder, dtype="float32").model
    parameters = list(model.parameters())
    held = sum((p.ds_tensor if sharded.is_split(p) else p).numel() for p in parameters)
    total = sum(sharded.shape(p).numel() for p in parameters)
    embeddings = sharded.whole(model.get_input_embeddings().weight).double().sum().item()
    with open(f"{out}.{trainer.global_rank}", "w") as stream:
        json.dump([held, total, embeddings], stream)
    strategies.leave()
