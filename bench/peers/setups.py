"""The two set-ups in which every peer runs: as its users run it, and tuned by us. All that differs between them is in this file, apart
from the number of processes and threads, which ``bench/figures/throughput.py`` chooses.

Both do the same steps on the same rows in the same order: dropout off, AdamW, gradients clipped, float32 or the same mixed precision.

=================  ==============================================  ==============================================================
what               ``as-documented``                               ``tuned``
=================  ==============================================  ==============================================================
attention          transformers' choice                            eager or sdpa, whichever is faster here
tensors out, in    PEFT's two functions                            straight from and to the parameters
optimiser          ``AdamW(model.parameters())``                   fused, on the trained parameters
batches            ``DataLoader``, ``DataCollatorWithPadding``     padded with NumPy
loss               the model's own                                 of the logits
model              loaded where the example loads it               once a process
=================  ==============================================  ==============================================================

Where ``as-documented`` comes from (repository: file; what the peers add of their own is said in their files):

- huggingface/peft: examples/sequence_classification/LoRA.ipynb. The only example here that is both LoRA and classification: no
  ``attn_implementation``, ``torch.optim.AdamW`` on all parameters, a ``DataLoader`` that pads each batch to its longest, the model's loss.
- flwrlabs/flower: examples/quickstart-huggingface/huggingface_example/task.py, which is also its tutorial on transformers: the same loop,
  with ``DataCollatorWithPadding``.
- flwrlabs/flower: examples/flowertune-llm/flowertune_llm/client_app.py; rui-ye/OpenFedLLM: main_sft.py; NVIDIA/NVFlare:
  examples/hello-world/hello-huggingface/model.py: tensors by ``get_peft_model_state_dict`` and ``set_peft_model_state_dict``.

The last three train by a Trainer; here the research script does (:func:`by_trainer`). What these examples do besides is left out in both
set-ups: tokenising in the client, evaluating, saving checkpoints and models, logging.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from task import Settings, job_of
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

Batch = Mapping[str, torch.Tensor]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Setup:
    """How a peer loads and trains.

    Attributes:
        model: the base with LoRA on it, in training mode.
        state: the trained tensors, by the names that PEFT saves; they may share memory with the model.
        load: put such tensors into the model.
        optimizer: a fresh AdamW.
        batches: one epoch over rows, in their order.
        loss: mean cross-entropy of a batch.
    """

    model: Callable[[Settings], Any]
    state: Callable[[Any], Tensors]
    load: Callable[[Any, Tensors], object]
    optimizer: Callable[[Any, Settings], torch.optim.Optimizer]
    batches: Callable[[Sequence[int], Settings], Iterable[Batch]]
    loss: Callable[[Any, Batch], torch.Tensor]

    def step(self, model: Any, optimizer: torch.optim.Optimizer, batch: Batch, how: Settings) -> None:
        """One step."""
        with mixed(how):
            loss = self.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], job_of(how.job).settings["clip"])
        optimizer.step()
        optimizer.zero_grad()

    def train(self, model: Any, rows: Sequence[int], how: Settings) -> None:
        """Local training: one epoch over a device's rows with a fresh AdamW."""
        optimizer = self.optimizer(model, how)
        for batch in self.batches(rows, how):
            self.step(model, optimizer, batch, how)

    def copied(self, model: Any) -> dict[str, torch.Tensor]:
        """A copy of the trained tensors."""
        return {name: tensor.detach().clone() for name, tensor in self.state(model).items()}


def built(how: Settings) -> Any:
    """The base with LoRA on it, loaded from the job's model folder; the trained tensors are PEFT's random ones, in float32."""
    s = job_of(how.job).settings
    chosen = {} if how.attention == "default" else {"attn_implementation": how.attention}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = AutoModelForSequenceClassification.from_pretrained(
        s["model"], num_labels=s["classes"], dtype=how.dtype, local_files_only=True, **off, **chosen
    )
    model = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=s["rank"], lora_alpha=s["alpha"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def mixed(how: Settings) -> AbstractContextManager[Any]:
    """Autocast in bf16, nothing in float32."""
    return torch.autocast("cpu", torch.bfloat16) if how.precision == "bf16" else nullcontext()


# as-documented


def _all_adamw(model: Any, how: Settings) -> torch.optim.Optimizer:
    s = job_of(how.job).settings
    return torch.optim.AdamW(model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"])


def examples(rows: Sequence[int], how: Settings) -> list[dict[str, Any]]:
    """Rows as tokenised examples, as a tokenizer leaves them in a dataset."""
    job = job_of(how.job)
    texts = [job.text(row).tolist() for row in rows]
    return [
        {"input_ids": text, "attention_mask": [1] * len(text), "label": int(job.labels[row])} for text, row in zip(texts, rows, strict=True)
    ]


@functools.cache
def collator(how: Settings) -> DataCollatorWithPadding:
    """Pads a batch to its longest and calls its labels ``labels``."""
    return DataCollatorWithPadding(AutoTokenizer.from_pretrained(job_of(how.job).settings["model"], local_files_only=True))


def _loaded(rows: Sequence[int], how: Settings) -> Iterable[Batch]:
    found: Any = examples(rows, how)
    return DataLoader(found, batch_size=job_of(how.job).settings["batch"], collate_fn=collator(how))


def by_trainer(model: Any, rows: Sequence[int], how: Settings) -> None:
    """Local training as most research code on PEFT does it: a Trainer built anew for each device of each round, its arguments too.

    rui-ye/OpenFedLLM: main_sft.py, federated_learning/fed_local_sft.py; JayZhang42/FederatedGPT-Shepherd: fed_utils/client.py. Theirs
    generate text; for classification it is transformers' own Trainer. The order is the job's and the rate constant; it saves nothing and
    writes no log.
    """
    s = job_of(how.job).settings
    found: Any = examples(rows, how)
    with TemporaryDirectory() as folder:
        told = TrainingArguments(
            folder,
            per_device_train_batch_size=s["batch"],
            num_train_epochs=1,
            learning_rate=s["lr"],
            weight_decay=s["weight_decay"],
            max_grad_norm=s["clip"],
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            bf16=how.precision == "bf16",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model=model, args=told, train_dataset=found, data_collator=collator(how)).train()


# tuned


@functools.cache
def _named(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by the names that PEFT saves."""
    parts = (".modules_to_save.default", ".default")
    return {functools.reduce(lambda n, part: n.replace(part, ""), parts, n): p for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _load_in_place(model: Any, tensors: Tensors) -> None:
    for name, parameter in _named(model).items():
        parameter.copy_(tensors[name])


def _fused_adamw(model: Any, how: Settings) -> torch.optim.Optimizer:
    s = job_of(how.job).settings
    return torch.optim.AdamW(list(_named(model).values()), lr=s["lr"], weight_decay=s["weight_decay"], fused=True)


def _loss_of_logits(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits.float(), batch["labels"])


SETUPS: Mapping[str, Setup] = {
    "as-documented": Setup(
        model=built,
        state=get_peft_model_state_dict,
        load=set_peft_model_state_dict,
        optimizer=_all_adamw,
        batches=_loaded,
        loss=lambda model, batch: model(**batch).loss,
    ),
    "tuned": Setup(
        model=functools.cache(built),
        state=_named,
        load=_load_in_place,
        optimizer=_fused_adamw,
        batches=lambda rows, how: job_of(how.job).batches(rows),
        loss=_loss_of_logits,
    ),
}


def setup_of(how: Settings) -> Setup:
    """The set-up that the settings name."""
    return SETUPS[how.setup]
