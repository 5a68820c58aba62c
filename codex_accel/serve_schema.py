"""Every key of serving: its type, range, default and meaning, in one line each.

Rule: that of `schema`, whose line is the documentation everywhere. The token that other addresses need is no key: it
comes from the environment alone. Nothing here imports torch, a model library or a web framework.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from codex_accel.config import Section, StageConfig
from codex_accel.evaluate_schema import CHECKPOINT, Sampling
from codex_accel.schema import DEVICE, NonEmpty, Positive

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Limits(Section):
    """What one client, and all of them together, may take."""

    max_body_bytes: Positive = Field(1 << 20, description="Bytes of a request's body; more gets 413")
    max_prompt_tokens: Positive | None = Field(
        None, description="Tokens of a prompt; null: what the model has room for"
    )
    max_new_tokens: Positive = Field(1024, description="New tokens that a request may ask for, a text")
    max_texts: Positive = Field(16, description="Texts that a request may ask for: its prompts times its n")
    max_time_s: Seconds = Field(120.0, description="Seconds a request may take, waiting included; its text ends there")
    max_waiting: Positive = Field(
        128, description="Texts that may wait, besides max_running of them; requests beyond that get 429"
    )
    max_running: Positive = Field(64, description="Texts that go on together, a row of the batch each")
    batch_tokens: Positive = Field(
        32_768, description="Rows of the batch times the most tokens, prompt and new ones, that one of them may have"
    )
    max_connections: Positive = Field(256, description="Open connections; those beyond that get 429")
    receive_timeout_s: Seconds = Field(20.0, description="Seconds in which a request must be here, headers and body")
    send_timeout_s: Seconds = Field(20.0, description="Seconds in which a client must take what was sent")
    idle_timeout_s: Seconds = Field(30.0, description="Seconds that a connection may stay open between requests")
    drain_s: Seconds = Field(30.0, description="Seconds that requests have to finish after SIGTERM")

    @model_validator(mode="after")
    def _there_is_room_for_one(self) -> "Limits":
        if self.max_texts > self.max_waiting + 1:
            raise ValueError(f"max_texts = {self.max_texts} never fit into max_waiting = {self.max_waiting}. Raise it.")
        return self


class ServeConfig(StageConfig):
    """Keys of scripts/serve.py."""

    checkpoint: NonEmpty = CHECKPOINT
    host: NonEmpty = Field(
        "127.0.0.1",
        description="Address, or localhost; one beyond this machine needs CODEX_ACCEL_TOKEN in the environment",
    )
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(8000, description="TCP port; 0: a free one, which is printed")
    unix_socket: NonEmpty | None = Field(None, description="Listen on this socket file, open to this user, instead")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/@+-]{1,128}$")] | None = Field(
        None, description="Name of the model for clients; null: that of its folder, or of the run that it is of"
    )
    allowed_origins: list[NonEmpty] = Field(
        [], description="Origins, such as https://example.com, of web pages that may ask; those of all others get 403"
    )
    allowed_hosts: list[NonEmpty] = Field(
        [], description="Names in the Host header, besides loopback ones, that are answered without a token"
    )
    sampling: Sampling = Sampling()
    add_bos: bool = Field(True, description="Put BOS before each prompt, if the tokenizer has it")
    chat_template: NonEmpty | None = Field(
        None, description="File with the Jinja template that renders messages; null: the tokenizer's own"
    )
    limits: Limits = Limits()
    request_log: NonEmpty | None = Field(None, description="NDJSON file that gets a line for each request; null: none")
    request_log_max_bytes: Annotated[int, Field(ge=1024)] | None = Field(
        None, description="Size at which that file gets a number and a new one begins; bytes; null: one file"
    )
    log_prompts: bool = Field(False, description="Put prompts and texts into that log, masked")
    device: Literal["auto", "cpu", "cuda"] = DEVICE

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> "ServeConfig":
        if self.log_prompts and self.request_log is None:
            raise ValueError("log_prompts needs request_log, the file that they go to.")
        if self.request_log_max_bytes is not None and self.request_log is None:
            raise ValueError("request_log_max_bytes needs request_log, the file that it is about.")
        if self.unix_socket is not None and (self.allowed_hosts or self.allowed_origins):
            raise ValueError("allowed_hosts and allowed_origins mean nothing for a unix_socket. Remove them.")
        if self.sampling.max_new_tokens > self.limits.max_new_tokens:
            what = f"sampling.max_new_tokens = {self.sampling.max_new_tokens}, which holds where a request says nothing"
            raise ValueError(f"{what}, is above limits.max_new_tokens = {self.limits.max_new_tokens}. Lower it.")
        return self
