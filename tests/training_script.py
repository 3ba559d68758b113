"""`python training_script.py ARGUMENTS`: a training that writes down what it does, and that can be told to die.

Every training step adds a line to the file $DIARY: rank, step, keys of its samples, loss. The process gets SIGKILL so
many seconds after its first step ($KILL_AFTER), or when step $KILL_AT begins. Answers of rank $TERSE have one token.
"""

import json
import os
import signal
import sys
import threading
import time

from glimpseprune import train
from glimpseprune.training.glimpse import GlimpseModule
from glimpseprune.training.grpo import GRPOModule


def die(seconds: float = 0.0) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def watched(training_step):
    def step(self, inputs, index):
        if self.global_step == int(os.environ.get("KILL_AT", -1)):
            die()
        if "KILL_AFTER" in os.environ:
            threading.Thread(target=die, args=[float(os.environ.pop("KILL_AFTER"))], daemon=True).start()
        entry = [self.global_rank, self.global_step, [sample.key for sample in inputs.samples]]
        loss = training_step(self, inputs, index)
        entry.append([text for _, text, *_ in getattr(self, "said", [])])
        with open(os.environ["DIARY"], "a", encoding="utf-8") as stream:
            stream.write(json.dumps([*entry, None if loss is None else loss.item().hex()]) + "\n")
        return loss

    return step


for module in (GlimpseModule, GRPOModule):
    module.training_step = watched(module.training_step)
if "TERSE" in os.environ:
    GRPOModule.ends = property(lambda self: list(range(64)) if self.global_rank == int(os.environ["TERSE"]) else [])
if __name__ == "__main__":
    train.main(sys.argv[1:])
