"""Choosing tokens: the paper's nucleus, draws by the seed alone. Streamed text is never changed afterwards."""

import random
from typing import Any

import pytest
import torch
from support.generation import byte_fallback_tokenizer, byte_level_tokenizer

from gradstream.core.errors import CheckpointError
from gradstream.services.fine_tuning.generation.sampling import choose, nucleus
from gradstream.services.fine_tuning.generation.text_stream import Detokenizer, StopScanner, TextStream


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_nucleus(probabilities: list[float], top_p: float) -> set[int]:
    kept: set[int] = set()
    total = 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if kept and total >= top_p:
            break
        kept.add(token)
        total += probabilities[token]
    return kept


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_fewest_likeliest_tokens(top_p: float) -> None:
    for seed in range(20):
        probabilities_V = (torch.randn(50, generator=seeded(seed)).double() * 3).softmax(0)
        kept = set(nucleus(probabilities_V, top_p).nonzero().flatten().tolist())
        assert kept == plain_nucleus(probabilities_V.tolist(), top_p)


@pytest.mark.parametrize("scale", [0.1, 2, 3, 20])  # from a nucleus of nearly all tokens to one of a single token
@pytest.mark.parametrize("num_digits", [0, 2, 15])  # of the logits: with few digits many tokens are equally likely
def test_the_nucleus_of_a_large_vocabulary_is_the_same(scale: float, num_digits: int) -> None:
    logits_V = torch.randn(6000, generator=seeded(1)).double() * scale
    probabilities_V = logits_V.round(decimals=num_digits).softmax(0)
    for top_p in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0):
        sorted_V, order_V = torch.sort(probabilities_V, descending=True, stable=True)
        num_kept = max(1, int((sorted_V.cumsum(0) - sorted_V < top_p).sum()))
        assert nucleus(probabilities_V, top_p).nonzero().flatten().tolist() == sorted(order_V[:num_kept].tolist())


def test_the_nucleus_ends_where_it_is_reached() -> None:
    quarters_V = torch.tensor([0.125, 0.25, 0.5, 0.125])
    assert nucleus(quarters_V, 0.5).tolist() == [False, False, True, False]
    assert nucleus(quarters_V, 0.51).tolist() == [False, True, True, False]
    assert nucleus(quarters_V, 0.8).tolist() == [True, True, True, False]  # of equals the first


def test_draws_follow_the_probabilities_within_the_nucleus() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0, -4.0, 2.5])
    generator, temperature, top_p = seeded(0), 1.5, 0.9
    draws = torch.tensor([choose(logits_V, temperature, top_p, generator) for _ in range(4000)])
    kept_V = nucleus((logits_V / temperature).softmax(0), top_p)
    assert kept_V.sum() == 4
    expected_V = (logits_V / temperature).softmax(0) * kept_V
    shares_V = torch.bincount(draws, minlength=5) / 4000
    assert torch.allclose(shares_V, expected_V / expected_V.sum(), atol=0.03)
    assert shares_V[3] == 0


def test_draws_are_the_seeds_and_survive_rounding() -> None:
    logits_V = torch.randn(300, generator=seeded(7))
    noise_V = torch.randn(300, generator=seeded(8)) * 1e-6
    one, other = seeded(3), seeded(3)
    first = [choose(logits_V, 1.0, 0.95, one) for _ in range(50)]
    again = [choose(logits_V + noise_V, 1.0, 0.95, other) for _ in range(50)]
    assert first == again
    assert first != [choose(logits_V, 1.0, 0.95, seeded(seed)) for seed in range(50)]


def test_extremes() -> None:
    logits_V = torch.tensor([1.0, float("-inf"), 5.0, 4.999])
    assert choose(logits_V, 0.0, 1.0, seeded(0)) == 2
    assert all(choose(logits_V, 1e-300, 1.0, seeded(seed)) == 2 for seed in range(20))
    assert 1 not in {choose(logits_V, 1e9, 1.0, seeded(seed)) for seed in range(50)}
    with pytest.raises(CheckpointError, match="not finite"):
        choose(torch.tensor([1.0, float("nan")]), 0.0, 1.0, seeded(0))


TOKENIZERS = {"byte-level": byte_level_tokenizer, "byte-fallback": byte_fallback_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def pieces_of(tokenizer: Any, prompt_ids: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def test_pieces_are_the_whole_text_and_no_half_characters(tokenizer: Any) -> None:
    prompt_ids = tokenizer.encode("Hello there", add_special_tokens=False)
    text = " the café in 東京 🎉 is naïve"
    ids = tokenizer.encode("Hello there" + text, add_special_tokens=False)[len(prompt_ids) :]
    assert len(ids) > len(text) or len(text.encode()) > len(text)
    pieces = pieces_of(tokenizer, prompt_ids, ids)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # Plain letters come at once.
    first = tokenizer.encode("Hello there the", add_special_tokens=False)[len(prompt_ids) :]
    assert all(piece for piece in pieces[: len(first)])


def test_pieces_are_the_whole_text_of_any_tokens(tokenizer: Any) -> None:
    """Also of bytes that are no characters, and special tokens in between."""
    prompt_ids = tokenizer.encode("Hello", add_special_tokens=False)
    draw = random.Random(0)
    for _ in range(150):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(12))]
        whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
        assert "Hello" + "".join(pieces_of(tokenizer, prompt_ids, ids)) == whole, ids


@pytest.mark.parametrize("num_faces", [1, 3, 8])
def test_a_prompt_whose_end_is_many_bytes_is_read_from_their_beginning(tokenizer: Any, num_faces: int) -> None:
    """A family of joined emoji is some 18 byte tokens; a run of them read from its middle is no text."""
    text = "so " + "\N{WOMAN}\N{ZERO WIDTH JOINER}" * num_faces + "\N{GIRL} it is"
    ids = tokenizer.encode(text, add_special_tokens=False)
    cuts = [cut for cut in range(1, len(ids)) if text.startswith(tokenizer.decode(ids[:cut]))]
    assert len(cuts) > num_faces
    for cut in cuts:
        assert tokenizer.decode(ids[:cut]) + "".join(pieces_of(tokenizer, ids[:cut], ids[cut:])) == text, cut


def test_a_prompt_that_ends_within_a_character_is_completed() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode("a\N{SNOWMAN}b", add_special_tokens=False)
    assert len(ids) == 5
    assert "".join(pieces_of(tokenizer, ids[:3], ids[3:])) == "\N{SNOWMAN}b"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac", "zz"], "ab"),
        ("xabcd", ["abcd", "bc"], "xa"),  # complete first
        ("xabcd", ["cd", "bcd"], "xa"),  # complete together: the longest
        ("one\n\n", ["\n\n\n"], "one\n\n"),
    ],
)
def test_stop_texts_end_the_text_however_it_is_cut(text: str, stop: list[str], shown: str) -> None:
    for cuts in range(1 << (len(text) - 1)):
        scanner, out, piece = StopScanner(stop), "", ""
        for at, letter in enumerate(text):
            piece += letter
            if (cuts >> at) & 1 or at == len(text) - 1:
                out += scanner.push(piece)
                piece = ""
                assert shown.startswith(out)  # nothing has to be taken back
            if scanner.stopped:
                break
        out += scanner.flush()
        assert (out, scanner.stopped) == (shown, shown != text)


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    scanner = StopScanner(["###", "\nUser:"])
    assert [scanner.push(piece) for piece in ["a#", "#", "b", "\nUse", "d"]] == ["a", "", "##b", "", "\nUsed"]


def test_a_stop_text_in_the_held_rest_counts() -> None:
    tokenizer = byte_level_tokenizer()
    incomplete = tokenizer.encode("\N{SNOWMAN}", add_special_tokens=False)[:2]
    stream = TextStream(tokenizer, tokenizer.encode("x"), ["\N{REPLACEMENT CHARACTER}"])
    assert [stream.push(token) for token in incomplete] == ["", ""]
    assert (stream.flush(), stream.stopped) == ("", True)
