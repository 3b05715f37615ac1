"""FedCyBGD with its paper's settings (2406.11187): 64 clients, a transformer layer each in turn, six cycles.

    fedloom run recipes/fedcybgd_paper.py --data FOLDER --model FOLDER
    fedloom run recipes/fedcybgd_paper.py --method.inner.lr 1e-4                         any option overrides what stands here

64 clients, one a turn; a cycle is 64 turns (max(K, D) of a model of 64 layers at most), six of them 384 rounds; 3 local epochs in batches
of 16; AdamW at 1e-6, falling along half a cosine within a turn; prompts and answers of up to 512 tokens each; blocks in ascending order;
bfloat16 with trained tensors in float32. A block comes up in half precision, as in the paper: 404.8 MB of a layer of LLaMA-2-7B
(202,383,360 numbers), as the change to what was sent. Down go float32 numbers, of the same layer 809.5 MB.

The paper's model is LLaMA-2-7B and its data Alpaca-GPT4. A rate of 1e-6 is for a model of that size: tune it for a smaller one. How the
paper deals the data is not known; here it is at random.
"""

from __future__ import annotations

from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.run.experiment import Experiment
from fedloom.server.cycle import turns

CLIENTS, LAYERS, CYCLES = 64, 32, 6

experiment = Experiment(
    FedCyBGD(FedAvg(lr=1e-6, local_epochs=3, batch_size=16, schedule="cosine"), order="ascending"),
    data="vicgalle/alpaca-gpt4",
    task="instructions",
    model="meta-llama/Llama-2-7b-hf",
    clients=CLIENTS,
    cohort=1,
    rounds=CYCLES * turns(CLIENTS, LAYERS),
    partition="iid",
    precision="bf16",
    max_length=1024,
    wire="up:fp16",
)
