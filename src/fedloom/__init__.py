"""Federated fine-tuning of pre-trained language models: a method is one file, and runs in a simulation and between real machines.

The command is ``fedloom`` (``fedloom --help``). From Python, :class:`fedloom.run.experiment.Experiment` says what is to be run and
:func:`fedloom.run.loop.run` runs it in a folder; methods are in :mod:`fedloom.methods`, and :mod:`fedloom.methods.method` says what one is.
"""
