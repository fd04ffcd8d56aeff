"""The error families: what is retried, what becomes a failed row, and what stops a run before it starts."""

from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable codes of the `error_code` columns; renaming one is a breaking change."""

    BAD_ENTRY = "bad_entry"
    EMPTY_FILE = "empty_file"
    NOT_A_VIDEO = "not_a_video"
    NO_VIDEO_STREAM = "no_video_stream"
    ENCRYPTED = "encrypted"
    TRUNCATED = "truncated"
    NO_FRAMES = "no_frames"
    DECODE_FAILED = "decode_failed"
    UNSUPPORTED_CODEC = "unsupported_codec"
    TOO_LARGE = "too_large"
    DEADLINE = "deadline"
    MEMORY_LIMIT = "memory_limit"
    DECODER_CRASHED = "decoder_crashed"
    NOT_FOUND = "not_found"
    FORBIDDEN = "forbidden"
    CREDENTIALS = "credentials"
    ENCODE_FAILED = "encode_failed"
    NETWORK = "network"
    NO_SPACE = "no_space"
    LOST = "lost"
    PROMPT_TOO_LONG = "prompt_too_long"
    BUDGET_TOO_SMALL = "budget_too_small"
    BAD_TOKENS = "bad_tokens"
    ANSWER_FAILED = "answer_failed"
    CUT_OFF = "cut_off"
    JUDGE_FAILED = "judge_failed"


# What is wrong with the video itself, whoever looks at it and whenever; all else may be an outage.
OWN_FAILURES = frozenset(
    {
        ErrorCode.BAD_ENTRY,
        ErrorCode.EMPTY_FILE,
        ErrorCode.NOT_A_VIDEO,
        ErrorCode.NO_VIDEO_STREAM,
        ErrorCode.ENCRYPTED,
        ErrorCode.TRUNCATED,
        ErrorCode.NO_FRAMES,
        ErrorCode.DECODE_FAILED,
        ErrorCode.UNSUPPORTED_CODEC,
        ErrorCode.TOO_LARGE,
    }
)
ANY_CODE = "all"  # where codes of failures to retry are named: whatever they failed of


class PipelineError(Exception):
    """A failure with a stable code and one sentence for the person who reads the failed row."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, message)  # both as args, so that the error pickles across processes
        self.code = code
        self.message = message

    def __str__(self) -> str:
        """The sentence alone; the code has a column of its own."""
        return self.message


class TransientError(PipelineError):
    """May pass by itself (network, a lost worker): retried with backoff, a bounded number of times."""


class TerminalError(PipelineError):
    """Will not pass by itself: a failed row, not tried again until asked or until the file changes."""


class InputError(Exception):
    """What the user gave cannot work: one sentence saying what is wrong and what to do; exit code 2."""


class QueryError(InputError):
    """A query that cannot run, in DuckDB's own words: several lines, with what it may have meant instead."""
