"""Shared parts of the commands: options, logging, and the conversion of errors to one line and an exit status."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from jobs.shell import Interrupted
from pipeline.cluster import extract_cause
from pipeline.config.loading import validate_section
from pipeline.config.run import load_sections
from pipeline.config.sections import StorageConfig
from pipeline.retrieval.encoder import EncoderStyle
from pipeline.retrieval.words import WordForm
from pipeline.storage.location import join_lines

log = logging.getLogger(__name__)

RunFile = Annotated[
    str | None, typer.Option("--config", help="YAML file of a run; only its section 'storage' is used.")
]
StorageSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A storage setting, such as storage.endpoint_url=http://host:9000."),
]
IndexFile = Annotated[
    str | None,
    typer.Option("--config", help="YAML file of a run; only its sections 'storage' and 'retrieval' are used."),
]
IndexSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting, such as storage.endpoint_url=http://host:9000, or retrieval.threads=4."),
]
# Options of the commands that build or plan an index.
Passages = Annotated[str, typer.Option(help="Parquet file or folder with the columns id, text and, optionally, title.")]
EncoderName = Annotated[str, typer.Option("--encoder", help="Encoder: hub name, folder, or 'demo'.")]
QueryPrefix = Annotated[str, typer.Option(help="Text before every query, such as 'query: ' for E5.")]
PassagePrefix = Annotated[str, typer.Option(help="Text before every passage, such as 'passage: '.")]
Normalise = Annotated[
    bool, typer.Option("--normalise/--no-normalise", help="Scale vectors to unit length; not for Contriever.")
]
EncoderType = Annotated[
    str, typer.Option("--dtype", help="Data type of the encoder's weights on a GPU: float32, float16, bfloat16.")
]
Embeddings = Annotated[
    str | None, typer.Option(help="Column with precomputed vectors of the passages, made by the same encoder.")
]
PassageColumns = Annotated[
    list[str] | None,
    typer.Option("--column", help="NAME=COLUMN: column of id, title or text, such as text=contents; repeatable."),
]
MaxWords = Annotated[
    int | None,
    typer.Option(min=1, help="Split longer passages at sentence ends into parts of at most this many words."),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option(help="Further column to keep with the passages, for filters and in the output; repeatable."),
]
Factory = Annotated[str, typer.Option(help="FAISS factory string, such as IVF4096,SQ8 or HNSW32.")]
Lexical = Annotated[
    bool, typer.Option("--lexical", help="Also index the words of the passages (BM25), for retrieval.fusion.")
]
Stemmer = Annotated[
    str | None,
    typer.Option(help="Language of the Snowball stemmer for --lexical; words are compared whole by default."),
]
StopWords = Annotated[
    str | None, typer.Option(help="Language whose stop words --lexical leaves out; none are by default.")
]
Shards = Annotated[int, typer.Option(min=1, help="Number of shards of the index.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Passages per batch of the encoder.")]


def load_index_storage(config: str | None, settings: list[str] | None) -> StorageConfig:
    """Read the section ``storage`` for a command on indexes, which accepts settings of ``retrieval`` too.

    Raises:
        ValueError: a setting is of another section, or wrong.
    """
    sections = load_sections(config, settings or [], ["storage", "retrieval"])
    return validate_section(StorageConfig, sections["storage"], "storage")


def build_encoder_style(query_prefix: str, passage_prefix: str, normalise: bool, dtype: str) -> EncoderStyle:
    """Build the style of an encoder from the options of a command.

    Raises:
        ValueError: an option is wrong.
    """
    style = {"query_prefix": query_prefix, "passage_prefix": passage_prefix, "normalised": normalise, "dtype": dtype}
    return validate_section(EncoderStyle, style, "encoder")


def build_word_form(lexical: bool, stemmer: str | None, stop_words: str | None) -> WordForm | None:
    """Build the form of words from the options of a command; None without a lexical part.

    Raises:
        ValueError: an option is wrong, or given without ``--lexical``.
    """
    if not lexical:
        if given := stemmer or stop_words:
            raise ValueError(f"{given}: --stemmer and --stop-words need --lexical")
        return None
    return validate_section(WordForm, {"stemmer": stemmer, "stop_words": stop_words}, "lexical")


def parse_columns(options: Iterable[str], example: str) -> dict[str, str]:
    """Parse options of the form ``NAME=COLUMN`` to columns by name.

    Args:
        options: values of ``--column``.
        example: such an option, for the message.

    Raises:
        ValueError: an option has another form.
    """
    pairs = {option: option.partition("=") for option in options}
    for option, (name, _, column) in pairs.items():
        if not name or not column:
            raise ValueError(f"--column {option}: expected NAME=COLUMN, such as {example}")
    return {name: column for name, _, column in pairs.values()}


def require(value: str, option: str) -> str:
    """Return an option's value.

    Raises:
        ValueError: it is missing.
    """
    if not value:
        raise ValueError(f"{option} is missing")
    return value


class FailedError(typer.Exit):
    """Exit of a command with a status, after its error message was printed.

    Attributes:
        message: the error message, in one line.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status)
        self.message = message


def fail(message: object, status: int) -> NoReturn:
    """Print an error as one line on stderr and end the command with a status."""
    line = join_lines(message)
    typer.echo(f"error: {line}", err=True)
    raise FailedError(status, line) from None


@contextmanager
def checking(*others: type[Exception]) -> Iterator[None]:
    """End the command with status 2 if its input is wrong or cannot be read.

    Args:
        others: exceptions that mean wrong input, in addition to ``ValueError`` and ``OSError``.
    """
    bad_input: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except bad_input as error:
        fail(error, 2)


@contextmanager
def working(
    hint: str | None = None,
    bad_input: tuple[type[ValueError], ...] = (ValueError,),
    subject: str | None = None,
    resumable: bool = False,
    overwrite: bool = False,
) -> Iterator[None]:
    """End the command if its work fails: status 2 for bad input that only the work could find, otherwise 1.

    Args:
        hint: message logged with the traceback of a failure, with the way to continue. Work with a hint runs on Ray,
            whose messages are reduced to their cause.
        bad_input: exceptions that mean bad input.
        subject: name that the message begins with.
        resumable: whether the same command continues work that was interrupted.
        overwrite: whether the command was given ``--overwrite``, which would begin the work anew.
    """
    try:
        yield
    except Interrupted as end:
        end.resumable, end.overwrite = resumable, overwrite
        raise
    except typer.Exit:
        raise
    except Exception as error:
        message = f"{subject}: {error}" if subject else str(error)
        if isinstance(error, bad_input) and not _is_failure(error):
            fail(message, 2)
        if hint:
            log.exception(hint)
            fail(extract_cause(error), 1)
        if not isinstance(error, (ValueError, OSError, RuntimeError)):
            log.exception("unexpected error")
        fail(message, 1)


def _is_failure(error: Exception) -> bool:
    """Whether a ``ValueError`` means a failed task or a damaged file rather than bad input."""
    from ray.exceptions import RayError

    from pipeline.retrieval.index_cache import DamagedIndexError

    return isinstance(error, RayError | DamagedIndexError)


def start_logging(level: int = logging.WARNING, progress: Iterable[str] = (), timestamps: bool = False) -> None:
    """Log to stderr.

    Args:
        level: lowest level of the messages that are shown.
        progress: names of loggers whose progress messages (INFO) are shown in any case.
        timestamps: whether lines begin with time and level, for commands that run for long.
    """
    line = "%(asctime)s %(levelname)s %(message)s" if timestamps else "%(message)s"
    logging.basicConfig(level=level, format=line, stream=sys.stderr)
    for name in progress:
        logging.getLogger(name).setLevel(logging.INFO)


def hint_at_new_form(old: str, new: str) -> None:
    """Print a hint that a form of a command is deprecated, with its replacement."""
    typer.echo(f"hint: {old} is deprecated and will be removed in version 0.3; use: {new}", err=True)
