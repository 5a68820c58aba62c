"""What a client asks for, as requests to the model: encoded, completed from the configuration, held against the limits.

Rule: a request fits as it is or is refused; nothing of it is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from codex_accel import generation, prompts, seeds
from codex_accel.api import Asked, Prompt, Refused
from codex_accel.errors import UserError
from codex_accel.policy import Policy
from codex_accel.serve_schema import ServeConfig
from codex_accel.text_stream import MaskedStream
from codex_accel.tokenizer import Tokenizer

TAIL = 4096  # characters at the end of a prompt that may make a secret of what follows: a private key has fewer


@dataclass(frozen=True)
class Admitted:
    """Requests for the model, a text each: those of the first prompt, then those of the second, ..."""

    requests: tuple[generation.Request, ...]
    num_prompt_tokens: int  # each prompt counted once
    seed: int
    tails: tuple[str, ...]  # of each text, the end of its prompt
    openings: tuple[MaskedStream, ...]  # of each text, what masks it as what follows its prompt


@dataclass(frozen=True)
class Admission:
    """What the loaded model needs and allows. `num_positions` is None where there is no such limit."""

    config: ServeConfig
    tokenizer: Tokenizer
    num_embeddings: int
    num_positions: int | None
    policy: Policy | None = None  # of masking

    def admit(self, asked: Asked, *, number: int) -> Admitted:
        """The requests of `asked`, which is the `number`th of this server, for a seed if it names none.

        The draws of its first text are those of `scripts/generate.py` with the same seed. Raises: Refused.
        """
        limits, defaults = self.config.limits, self.config.sampling
        if asked.num_texts > limits.max_texts:
            what = f"{asked.num_texts} texts are asked for, and {limits.max_texts} may be in a request."
            raise Refused(400, "too_many_texts", what)
        seed = seeds.derive(defaults.seed, "request", number) if asked.seed is None else asked.seed
        temperature = defaults.temperature if asked.temperature is None else asked.temperature
        requests: list[generation.Request] = []
        tails: list[str] = []
        openings: list[MaskedStream] = []
        num_prompt_tokens = 0
        for prompt in asked.prompts:
            ids = self._encode(prompt)
            num_prompt_tokens += len(ids)
            tail = self.tokenizer.decode(ids[-TAIL:])[-TAIL:]
            tails += [tail] * asked.num_each
            openings += [MaskedStream(self.policy, tail)] * asked.num_each
            max_new_tokens = self._room(len(ids), asked.max_new_tokens)
            requests += (
                generation.Request(
                    input_ids=ids,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_k=defaults.top_k if asked.top_k is None else asked.top_k,
                    top_p=defaults.top_p if asked.top_p is None else asked.top_p,
                    seed=seeds.derive(seed, "prompt", index),
                    stop=tuple(defaults.stop) if asked.stop is None else asked.stop,
                    end_ids=self._turn_ends(prompt),
                )
                for index in range(len(requests), len(requests) + asked.num_each)
            )
        return Admitted(tuple(requests), num_prompt_tokens, seed, tuple(tails), tuple(openings))

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        add_bos = self.config.add_bos
        if isinstance(prompt, str):
            ids = prompts.encode_prompt(self.tokenizer, prompt, add_bos=add_bos)
        elif _is_ids(prompt):
            ids = tuple(prompt)  # type: ignore[arg-type]
            if max(ids) >= self.num_embeddings:
                what = f"a token id is {max(ids)}, and the model has {self.num_embeddings}."
                raise Refused(400, "no_such_token", what, param="prompt")
        else:
            ids = self._encode_messages(prompt)  # type: ignore[arg-type]
        if not ids:
            what = "the prompt is empty, and there is no BOS token before it. Give some text."
            raise Refused(400, "empty_prompt", what, param="prompt")
        return ids

    def _encode_messages(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        options = {"template_file": self.config.chat_template, "add_bos": self.config.add_bos}
        try:
            return prompts.encode_chat(self.tokenizer, messages, **options)  # type: ignore[arg-type]
        except ValueError as error:
            raise Refused(400, "messages_refused", f"messages: {error}.", param="messages") from None
        except UserError:
            what = "this model has no chat template, so it takes no messages. Send a prompt."
            raise Refused(400, "no_chat_template", what, param="messages") from None

    def _turn_ends(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str) or _is_ids(prompt):
            return ()
        return prompts.turn_end_ids(self.tokenizer, template_file=self.config.chat_template)

    def _room(self, num_prompt_tokens: int, asked: int | None) -> int:
        """New tokens of a text: what is asked for, or the default as far as there is room. Raises: Refused."""
        limits = self.config.limits
        longest = self.num_positions
        most = limits.max_prompt_tokens or (longest and longest - 1)
        if most and num_prompt_tokens > min(most, (longest or most + 1) - 1):
            what = (
                f"the prompt has {num_prompt_tokens} tokens, and {min(most, (longest or most + 1) - 1)} may be there."
            )
            raise Refused(400, "context_length_exceeded", what, param="prompt")
        if asked is not None and asked > limits.max_new_tokens:
            what = f"{asked} new tokens are asked for, and {limits.max_new_tokens} may be in a text."
            raise Refused(400, "too_many_tokens", what, param="max_tokens")
        wanted = self.config.sampling.max_new_tokens if asked is None else asked
        room = wanted if longest is None else longest - num_prompt_tokens
        if asked is not None and asked > room:
            what = (
                f"{asked} new tokens after {num_prompt_tokens} of the prompt go beyond the model's {longest} positions."
            )
            raise Refused(400, "context_length_exceeded", f"{what} Ask for {room} at most.", param="max_tokens")
        return min(wanted, room)


def _is_ids(prompt: Prompt) -> bool:
    return isinstance(prompt[0], int) if prompt else False
