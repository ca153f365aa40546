"""Runs train.py or train_search.py in this process, on a model so small that a run takes a second."""

from helpers import SIZES

import train
import train_search

SCRIPTS = {"train": train, "search": train_search}
CELL = "Genotype(recurrent=[('tanh',0),('relu',1)],concat=[1,2])"  # trained unless the flags have an --arch


def run(kind, corpus, save, flags):
    """Runs the script of this kind with the flags and returns the run's directory, `save`."""
    arch = ["--arch", CELL] if kind == "train" and "--finetune" not in flags else []
    assert SCRIPTS[kind].main([*SIZES, *arch, "--data", str(corpus), "--save", str(save), *flags.split()]) == 0
    return save
