"""Answers: a causal language model writes what is due after a prompt, and is trained on the answer's tokens alone.

    ℓ(s) = −(1/|a|) Σ_t log softmax(z_{t−1})[a_t]      a: the tokens of the answer and the end of text;  z: the model's logits

A conversation has several answers, a plain text is nothing else (``Form``).
Of an example's tokens those of segment 0 are the prompt's and those of segment 1 the answer's (a causal model reads no segments itself).
The mean over an example's tokens makes every example count alike, as the curricula, Fisher scores and n_k/n of the methods take it.

This file knows tokenizers by what they do, not transformers. Shapes: B texts, L tokens, T tokens in all, r tokens of answers, V words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from fedloom.model.asked import Asked
from fedloom.model.reader import Encoded, First

PLAIN = "### Instruction:\n{text}\n\n### Response:\n"
"""What a prompt is put into where the tokenizer has no chat template and nobody gives another."""

Form = Literal["instructions", "text", "chat"]
"""What is given: prompts and their answers; texts; or conversations, JSON of [role, text] of their turns."""


class AnswerError(ValueError):
    """A template or a tokenizer that no answer can follow; the message says what could."""


FIRST = 2
"""The segment of a text's first token, which is never due. That of the first token of its other windows is 0."""


def first_of(segments: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The first window of every text, int64, and last the number of windows."""
    return np.append(np.flatnonzero(segments[offsets[:-1]] == FIRST), len(offsets) - 1)


@dataclass(frozen=True)
class Speaker:
    """Prompts and answers as tokens: a :class:`~fedloom.model.reader.ReadsMany`.

    ``template``: a sentence with ``{text}``, after which the answer comes ("": the tokenizer's chat template, else :data:`PLAIN`).
    ``length``: tokens of an example at most. ``form``: what an example is.

    Raises:
        AnswerError: no ``{text}`` in the template, a tokenizer that tells no characters, one without an end of text, or too short a length.
    """

    tokenizer: Any
    template: str
    length: int
    form: Form = "instructions"

    width = 3
    segment = 1
    place = 0

    def __post_init__(self) -> None:
        if self.template and self.template.count("{text}") != 1:
            raise AnswerError(f"the template {self.template!r} must have {{text}} once, where the prompt goes; the answer comes after it")
        if not self.tokenizer.is_fast:
            raise AnswerError("answers need a fast tokenizer, which tells the characters of each token")
        if self.tokenizer.eos_token_id is None:
            raise AnswerError("this tokenizer has no end of text, so no answer would ever end; give a model whose tokenizer has one")
        if self.form == "text" and self.length < 2:
            raise AnswerError(f"a window of {self.length} token has nothing to be learnt from; give more: --max-length")
        if self.form != "text" and len(self._prompt("")) + 2 > self.length:
            raise AnswerError(f"the template alone takes {len(self._prompt(''))} of the {self.length} tokens of --max-length; give more")

    @cached_property
    def chat_template(self) -> str:
        """The conversation as Jinja, for ``tokenizer.apply_chat_template``: the tokenizer's own, unless a sentence takes its place."""
        if not self.template and self.tokenizer.chat_template:
            return self.tokenizer.chat_template
        before, after = (json.dumps(part, ensure_ascii=False) for part in (self.template or PLAIN).split("{text}"))
        first = "{{ bos_token }}" if self._begins else ""
        user = "{{ " + before + " + m['content'] + " + after + " }}"
        return (
            first
            + "{% for m in messages %}{% if m['role'] == 'user' %}"
            + user
            + "{% elif m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
            + "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
        )

    @property
    def _begins(self) -> bool:
        """Whether this tokenizer begins a text with a token of its own."""
        return self.tokenizer.bos_token_id is not None and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]

    def written(self, prompt: str) -> str:
        """The prompt in its template."""
        return self._rendered([("user", prompt)], asks=True)

    def _rendered(self, turns: Sequence[tuple[str, str]], asks: bool) -> str:
        """These turns in their template; one that ``asks`` is up to where the assistant answers.

        Raises:
            AnswerError: the template takes no such conversation.
        """
        said = [{"role": role, "content": text} for role, text in turns]
        try:
            return self.tokenizer.apply_chat_template(said, chat_template=self.chat_template, tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # a template may raise whatever it likes
            raise AnswerError(
                f"the tokenizer's chat template takes no conversation of {', '.join(role for role, _ in turns)} ({error}); give another "
                "with --template"
            ) from error

    @property
    def cut_from(self) -> int | None:
        """Texts within a template are cut between characters, and some tokens stay free: counted as eight, more than there were."""
        return None if self.form == "text" else self.length - 8

    @property
    def first_of(self) -> First | None:
        """:func:`first_of` of plain texts."""
        return first_of if self.form == "text" else None

    @property
    def says(self) -> list[Any]:
        """The template, and what is given."""
        return [self.chat_template, self.form]

    def kinds_of(self, segments: torch.Tensor) -> torch.Tensor:
        """The segments themselves."""
        return segments

    def due(self, ids: np.ndarray, segments: np.ndarray, lengths: np.ndarray, device: torch.device) -> Asked:
        """The tokens after which one of an answer (segment 1) is due, of the tokens (T,) of texts of ``lengths`` (n,)."""
        texts = np.repeat(np.arange(len(lengths)), lengths)
        at = np.flatnonzero((segments[1:] > 0) & (texts[1:] == texts[:-1]))
        made = (np.asarray(of, np.int64) for of in (at, ids[at + 1], texts[at]))
        return Asked(*(torch.from_numpy(of).to(device) for of in made), count=len(lengths))

    def due_in_rows(self, ids: torch.Tensor, segments: torch.Tensor, mask: torch.Tensor) -> Asked:
        """The same from a padded batch (B, L)."""
        due = torch.zeros_like(mask)
        due[:, :-1] = mask[:, :-1] & mask[:, 1:] & (segments[:, 1:] > 0)
        at = due.flatten().nonzero()[:, 0]
        return Asked(at, ids.flatten()[at + 1], at // ids.shape[1], len(ids))

    def encode(self, texts: Sequence[str], others: Sequence[str] | None) -> Encoded:
        """Token ids and segments (0: prompt, 1: answer) of each example, ``length`` at most. ``texts``: prompts; ``others``: answers.

        Of an example that is too long the prompt's text is cut at its end, never the template around it; the answer keeps half of what the
        template leaves, or all that the prompt does not need. An answer that was cut has no end of text.

        Plain texts come as answers to nothing, and so do conversations. All of a text is due, but its first token; one that is too long
        becomes several examples (:func:`first_of`). Of a conversation what the assistant says, and the end of text that follows it.
        """
        prompts, answers = texts, others or [""] * len(texts)
        if self.form != "instructions":
            of = self._windows if self.form == "text" else self._conversation
            made = [window for text in answers for window in of(text)]
            return [ids for ids, _ in made], [segments for _, segments in made]
        before = self._tokens([self.written(prompt) for prompt in prompts])
        after = [[*answer, self.tokenizer.eos_token_id] for answer in self._tokens(answers)]
        for i, (asked, due) in enumerate(zip(before, after, strict=True)):
            if len(asked) + len(due) > self.length:
                before[i], after[i] = self._cut(prompts[i], asked, due)
        ids = [asked + due for asked, due in zip(before, after, strict=True)]
        return ids, [[0] * len(asked) + [1] * len(due) for asked, due in zip(before, after, strict=True)]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Each begins with the last token of the one before, so that every token but the first is due once."""
        first = [self.tokenizer.bos_token_id] if self._begins else []
        ids = [*first, *self._tokens([text])[0], self.tokenizer.eos_token_id]
        begins = range(0, max(1, len(ids) - 1), self.length - 1)
        windows = [ids[at : at + self.length] for at in begins]
        return [(window, [0 if at else FIRST] + [1] * (len(window) - 1)) for at, window in zip(begins, windows, strict=True)]

    def _conversation(self, given: str) -> list[tuple[list[int], list[int]]]:
        """One that is too long is cut at its end; if that would leave less than half of the room to the first answer, the question before
        it is cut, and what follows it is left out."""
        turns = [(str(role), str(text)) for role, text in json.loads(given)]
        whole, due = self._rendered(turns, asks=False), []
        for i in (i for i, (role, _) in enumerate(turns) if role == "assistant"):
            before, upto = self._rendered(turns[:i], asks=True), self._rendered(turns[: i + 1], asks=False)
            if not upto.startswith(before) or not whole.startswith(upto):
                raise AnswerError(
                    f"the tokenizer's chat template writes earlier turns otherwise when others follow (turn {i} of {given[:60]}); give "
                    "another with --template, which tells where the answer comes"
                )
            end = upto.rfind(self.tokenizer.eos_token, len(before))
            due.append((len(before), len(upto) if end < 0 else end + len(self.tokenizer.eos_token)))
        made = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(made["input_ids"])
        answer = [
            next((k + 1 for k, (low, high) in enumerate(due) if begin < high and end > low), 0) for begin, end in made["offset_mapping"]
        ]
        last = next(i for i in range(len(ids), -1, -1) if not i or answer[i - 1])
        ids, answer = ids[:last], answer[:last]
        if not ids or ids[-1] != self.tokenizer.eos_token_id:
            ids, answer = [*ids, self.tokenizer.eos_token_id], [*answer, len(due)]
        if len(ids) > self.length:
            ids, answer = self._cut_conversation(turns, ids, answer)
        return [(ids, [int(a > 0) for a in answer])]

    def _cut_conversation(self, turns: list[tuple[str, str]], ids: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        at = next(i for i, (role, _) in enumerate(turns) if role == "assistant")

        def asked(text: str) -> list[int]:
            return self._tokens([self._rendered([*turns[: at - 1], (turns[at - 1][0], text)], asks=True)])[0]

        first = [token for token, a in zip(ids, answer, strict=True) if a == 1]
        half = (self.length - len(asked(""))) // 2
        if half < 1:
            raise AnswerError(
                f"the {len(asked(''))} tokens around {turns[at - 1][1][:60]!r} leave none of {self.length}; give more: --max-length"
            )
        if (answer.index(1) if first else len(ids)) + min(len(first), half) <= self.length:
            return ids[: self.length], answer[: self.length]
        kept = self._shortened(turns[at - 1][1], asked, self.length - min(len(first), half))
        return kept + first[: self.length - len(kept)], [0] * len(kept) + [1] * min(len(first), self.length - len(kept))

    def asked(self, prompt: str, room: int) -> list[int]:
        """A prompt in its template, cut at its end to ``room`` tokens: what an answer is written after."""
        return self._shortened(prompt, self._prompt, room)

    def _cut(self, prompt: str, asked: list[int], due: list[int]) -> tuple[list[int], list[int]]:
        due = due[: max(self.length - len(asked), (self.length - len(self._prompt(""))) // 2)]
        return self._shortened(prompt, self._prompt, self.length - len(due)), due

    def _shortened(self, prompt: str, of: Callable[[str], list[int]], room: int) -> list[int]:
        asked = of(prompt)
        ends = [end for _, end in self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
        kept = len(ends)
        while len(asked) > room and kept:
            kept = max(0, kept - (len(asked) - room))
            asked = of(prompt[: ends[kept - 1]] if kept else "")
        return asked

    def _prompt(self, text: str) -> list[int]:
        return self._tokens([self.written(text)])[0]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
