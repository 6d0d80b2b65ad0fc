"""Turns conversations into tokens with a tokenizer's chat template."""

import hashlib
import json
import re
from typing import Any

import numpy as np

from sae_lightning.errors import UserError

ASSISTANT = "assistant"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks what the assistant generates


class ChatEncoder:
    """Turns a conversation into tokens, and marks those that are not trained on.

        <|user|>Hi<|end|><|assistant|>Hello<|end|>
        └─ earlier messages and ─────┘└─ trained on, with `assistant_only`
           the prompt for an answer

    A token that is not trained on is written as its complement ~id, which is negative. A template
    may mark the assistant's text ({% generation %}). Otherwise, the text that an assistant's
    message adds after the prompt for an answer is trained on.
    """

    def __init__(self, tokenizer: Any, assistant_only: bool) -> None:
        """UserError if the tokenizer has no chat template or, with `assistant_only`, no offsets."""
        if tokenizer.chat_template is None:
            raise UserError(
                "data.chat=true: the LLM's tokenizer has no chat template; choose an LLM that was "
                "trained on chats (llm=hf llm.name=...), or give text"
            )
        self.tokenizer, self.assistant_only = tokenizer, assistant_only
        self.template = tokenizer.get_chat_template()
        if assistant_only and not tokenizer.is_fast:
            raise UserError(
                "data.assistant_only=true: the LLM's tokenizer is a slow one, which does not say "
                "which characters a token stands for; leave this setting out"
            )

    @property
    def key(self) -> str:
        """Hash of the template and of `assistant_only`."""
        text = json.dumps([self.template, self.assistant_only])
        return hashlib.sha256(text.encode()).hexdigest()

    def encode_chat(self, chat: dict[str, Any], separator: int) -> np.ndarray:
        """Tokens [n] int32 of a conversation {messages, origin} and the separator after it, as
        complements where they are not trained on. UserError if the template fails, or does not show
        which text is the assistant's."""
        messages = chat["messages"]
        try:
            ids, is_trained = self._encode(messages)
        except UserError as error:
            raise UserError(f"{chat['origin']}: {error}") from error
        except Exception as error:  # a template is code that comes with the model
            raise UserError(
                f"{chat['origin']}: the LLM's chat template fails ({str(error).splitlines()[0]}); "
                "leave this conversation out"
            ) from error
        ids = np.array([*ids, separator])
        is_trained = np.array([*is_trained, not self.assistant_only])
        return np.where(is_trained, ids, ~ids).astype(np.int32)

    def _encode(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it is trained on."""
        if self.assistant_only and GENERATION.search(self.template):
            encoded = self.tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
        text = self._render(messages)
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=self.assistant_only,
            verbose=False,
        )
        ids = encoded["input_ids"]
        if not self.assistant_only:
            return ids, [True] * len(ids)
        answers, is_trained = self._find_answers(messages, text), []
        for start, end in encoded["offset_mapping"]:
            overlaps = any(begin < end and start < stop for begin, stop in answers)
            is_trained.append(overlaps and start < end)  # start = end: a token of no characters
        return ids, is_trained

    def _find_answers(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        """The range of characters, (begin, stop), that each message of the assistant adds after the
        prompt for an answer."""
        answers = []
        for index, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before = self._render(messages[:index], add_generation_prompt=True)
                after = self._render(messages[: index + 1])
                if not (after.startswith(before) and text.startswith(after)):
                    raise UserError(
                        "the LLM's chat template changes a message once others follow, so it does "
                        "not show what the assistant wrote; leave data.assistant_only out"
                    )
                answers.append((len(before), len(after)))
        return answers

    def _render(self, messages: list[dict], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
