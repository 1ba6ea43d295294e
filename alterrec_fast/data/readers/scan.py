"""Counts the records of a text table and checks its quotes, by parity and not by the parser that reads it.

A position is inside quotes if the number of quotes before it is odd. Positions are bits, 64 to a word, the first one
the highest, so that a pass costs less than the parser's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

_QUOTE, _LF, _CR, _BACKSLASH = b'"\n\r\\'
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 19


@dataclass(frozen=True)
class Scan:
    """What the bytes of a text table show.

    records: lines outside quotes, the header included, blank lines before it left away. proper: every quote stands
    where RFC 4180 lets it: around a whole field, or doubled inside one. escaped: a backslash stands before a quote.
    lone_cr: a carriage return outside quotes is not followed by a line feed. nul_line: the first line that holds a
    byte 0, or None.
    """

    records: int
    proper: bool
    escaped: bool
    lone_cr: bool
    nul_line: int | None


@dataclass(frozen=True)
class _Chunk:
    """A stretch of a file. near: (n + 2,) uint8, its bytes with one before and one after. quotes and inside: words of
    bits, the opening quote counted as inside. num_ends: line feeds outside quotes. ends_inside: after the chunk."""

    near: np.ndarray
    quotes: np.ndarray
    inside: np.ndarray
    num_lines: int
    num_ends: int
    ends_inside: bool


def scan(blocks: Iterable[bytes], separator: str, quoted: bool) -> Scan:
    """blocks: the file's bytes, in pieces of any size. Memory is bounded by the pieces, not by the file."""
    num_lines, blocks = _from_header(blocks)
    records, ends_inside, last = 0, False, _LF
    proper, escaped, lone_cr = True, False, False
    nul_line: int | None = None
    for chunk in _chunks(blocks, quoted):
        content, ends_inside, last = chunk.near[1:-1].tobytes(), chunk.ends_inside, chunk.near[-2]
        records += chunk.num_ends
        if nul_line is None and b"\0" in content:
            nul_line = 1 + num_lines + content.count(b"\n", 0, content.index(b"\0"))
        num_lines += chunk.num_lines
        if chunk.quotes.any():
            proper = proper and _are_proper(chunk, ord(separator))
            if b"\\" in content or chunk.near[0] == _BACKSLASH:
                escaped = escaped or bool((_bits(chunk.near[:-2] == _BACKSLASH) & chunk.quotes).any())
        if b"\r" in content:
            lone = (chunk.near[1:-1] == _CR) & (chunk.near[2:] != _LF)
            lone_cr = lone_cr or bool((_bits(lone) & ~chunk.inside).any())
    if ends_inside or last != _LF:
        records += 1  # the last line has no line feed
        lone_cr = lone_cr or bool(last == _CR)
    return Scan(records, proper and not ends_inside, escaped, lone_cr, nul_line)


def line_of_record(blocks: Iterable[bytes], record: int, quoted: bool) -> int:
    """The line (from 1) on which a record (from 0, the header) starts; the quotes must be proper."""
    num_blank, blocks = _from_header(blocks)
    line = 1 + num_blank
    if record == 0:
        return line
    for chunk in _chunks(blocks, quoted):
        if record <= chunk.num_ends:
            lines = _bits(chunk.near[1:-1] == _LF)
            end = _positions(lines & ~chunk.inside)[record - 1]
            return line + int(np.searchsorted(_positions(lines), end)) + 1
        record -= chunk.num_ends
        line += chunk.num_lines
    return line


def after_last_record(block: bytes, quoted: bool) -> int:
    """Where the last record ends of a block that starts with one, its line feed included; 0 where none does."""
    parity = block.count(b'"') % 2 if quoted else 0
    stop = len(block)
    while (end := block.rfind(b"\n", 0, stop)) >= 0:
        parity ^= block.count(b'"', end, stop) % 2 if quoted else 0
        if parity == 0:
            return end + 1
        stop = end
    return 0


def skip_blank(head: bytes) -> bytes:
    """The head of a file without a byte order mark and blank lines before the header."""
    return re.sub(rb"^(\r?\n)+", b"", head.removeprefix(_BOM))


def _from_header(blocks: Iterable[bytes]) -> tuple[int, Iterator[bytes]]:
    """The number of blank lines before the header, and the content from there on."""
    blocks, head = iter(blocks), b""
    for block in blocks:
        head += block
        if len(skip_blank(head)) > 1:  # a lone carriage return may go on with a line feed
            break
    content = skip_blank(head)
    return head.count(b"\n", 0, len(head) - len(content)), chain([content], blocks)


def _chunks(blocks: Iterable[bytes], quoted: bool) -> Iterator[_Chunk]:
    """Before the file and after it stands a line feed."""
    inside = False
    for surrounded in _surrounded(blocks):
        near = np.frombuffer(surrounded, np.uint8)
        is_line = near[1:-1] == _LF
        num_lines = num_ends = int(np.count_nonzero(is_line))
        quotes = inside_bits = np.zeros((len(is_line) + 63) // 64, np.uint64)
        if quoted and _QUOTE in surrounded[1:-1]:
            quotes = _bits(near[1:-1] == _QUOTE)
            inside_bits = quotes.copy()
            for shift in (1, 2, 4, 8, 16, 32):  # each bit becomes the parity of those up to it
                inside_bits ^= inside_bits >> np.uint64(shift)
            odd = inside_bits & np.uint64(1)
            odd_after = np.bitwise_xor.accumulate(odd) ^ np.uint64(inside)
            inside_bits ^= (odd_after ^ odd) * np.uint64(0xFFFF_FFFF_FFFF_FFFF)
            inside = bool(odd_after[-1])
            num_ends = _num_bits(_bits(is_line) & ~inside_bits)
        elif inside:
            inside_bits, num_ends = ~inside_bits, 0
        yield _Chunk(near, quotes, inside_bits, num_lines, num_ends, inside)


def _surrounded(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of _CHUNK bytes, each with the byte before it and the one after it."""
    before, rest = b"\n", b""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > _CHUNK:
            yield before + rest[start : start + _CHUNK + 1]
            start += _CHUNK
            before = rest[start - 1 : start]
        rest = rest[start:]
    if rest:
        yield before + rest + b"\n"


def _are_proper(chunk: _Chunk, separator: int) -> bool:
    """Whether an opening quote stands after the end of a field, and a closing one before; a quote beside a quote is
    one of a pair, whose second opens by parity."""
    near = chunk.near
    ends = (near == separator) | (near == _LF) | (near == _QUOTE)
    before, after = _bits(ends[:-2]), _bits(ends[2:] | (near[2:] == _CR))  # a lone one is found elsewhere
    opening, closing = chunk.quotes & chunk.inside, chunk.quotes & ~chunk.inside
    return not ((opening & ~before).any() or (closing & ~after).any())


def _bits(mask: np.ndarray) -> np.ndarray:
    """(n,) bool -> (ceil(n / 64),) uint64."""
    packed = np.packbits(mask)
    words = np.zeros((len(packed) + 7) // 8 * 8, np.uint8)
    words[: len(packed)] = packed
    return words.view(">u8").astype(np.uint64)


def _positions(bits: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(bits.astype(">u8").view(np.uint8)))


def _num_bits(bits: np.ndarray) -> int:
    two = bits - (bits >> np.uint64(1) & np.uint64(0x5555_5555_5555_5555))
    four = (two & np.uint64(0x3333_3333_3333_3333)) + (two >> np.uint64(2) & np.uint64(0x3333_3333_3333_3333))
    eight = four + (four >> np.uint64(4)) & np.uint64(0x0F0F_0F0F_0F0F_0F0F)
    return int(eight.view(np.uint8).sum(dtype=np.int64))
