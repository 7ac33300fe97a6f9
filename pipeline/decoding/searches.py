"""Records of the searches of a decoding, by which a later run tells whether they would find the same passages."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple

from pipeline.decoding.types import RetrievedPassage, SearchRecord


def record_searches(searches: Mapping[str, Sequence[RetrievedPassage]]) -> tuple[SearchRecord, ...]:
    """Return the records of searches, given what they found, in the order of their texts, whatever their timing."""
    return tuple(SearchRecord(text, digest_passages(found)) for text, found in sorted(searches.items()))


def digest_passages(found: Sequence[RetrievedPassage]) -> str:
    """Return a digest of passages in their order, without scores: 32 hexadecimal digits."""
    content = json.dumps([astuple(one.passage) for one in found], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:32]
