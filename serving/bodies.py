"""What a client may send, and what it is told: OpenAI's completions, and texts to classify or summarize."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

Token = Annotated[StrictInt, Field(ge=0)]
Tokens = Annotated[list[Token], Field(min_length=1)]
LONGEST = 100  # characters of a field's name in an error
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """Nothing is taken for something else, and what is not known is refused: a parameter without effect would
    go unnoticed."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Completion(Strict):
    """POST /v1/completions: greedy answers. Of OpenAI's other parameters those values that change nothing."""

    model: str | None = None
    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Tokens], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None
    stop: None = None
    logit_bias: None = None
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None  # of greedy answers it changes nothing
    seed: int | None = None
    user: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if alone else self.prompt


class Classify(Strict):
    """POST /v1/classify."""

    text: Text


class Summarize(Strict):
    """POST /v1/summarize."""

    dialogue: Text


class Refused(Exception):
    """A request that is answered with an error: OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def read(kind: type[Strict], body: bytes) -> Strict:
    """What `body` asks for. Raises Refused with 400, naming the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = str(first["loc"][0])[:LONGEST] if first["loc"] else None  # a client's own where it is unknown
        message = f"{field}: {first['msg']}" if field else first["msg"]
        raise Refused(400, message[: 2 * LONGEST], param=field) from None
