"""Tests of what is hidden, and behind what."""

from __future__ import annotations

import numpy as np
import pytest

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.pretraining.masking import STANDARD, Masker

RESIDUES = 200_000


@pytest.mark.parametrize("alphabet", ["esm1nv", "esm"])
def test_masks_follow_the_model_card(alphabet: str) -> None:
    known = ALPHABETS[alphabet]
    random = np.random.default_rng(0)
    text = "".join(random.choice(list(STANDARD + "XBZUO"), RESIDUES))
    tokens = np.concatenate([[known.start], known.encode(text), [known.end]]).astype(np.uint8)
    before = tokens.copy()
    masker = Masker(alphabet, share=0.15, mask_token_share=0.8, random_share=0.1)
    seen, places = masker(tokens, random)
    assert np.array_equal(tokens, before)
    assert np.all(np.diff(places) > 0)
    untouched = np.ones(len(tokens), dtype=bool)
    untouched[places] = False
    assert np.array_equal(seen[untouched], tokens[untouched])
    eligible = RESIDUES - text.count("X")
    # five standard deviations of a binomial of 192,000 at 0.15 are 0.0041, of 28,800 at 0.8 and 0.1 0.012 and 0.009
    assert len(places) / eligible == pytest.approx(0.15, abs=0.0041)
    assert known.pieces.index("X") not in tokens[places]
    assert known.start not in tokens[places]
    assert known.end not in tokens[places]
    hidden = seen[places] == known.pieces.index("<mask>")
    kept = seen[places] == tokens[places]
    assert hidden.mean() == pytest.approx(0.8, abs=0.012)
    assert kept.mean() == pytest.approx(0.1, abs=0.009)
    changed = seen[places][~hidden & ~kept]
    drawn = {known.pieces[number] for number in changed.tolist()}
    assert drawn == set(STANDARD)
    counts = np.bincount(changed)[[known.pieces.index(letter) for letter in STANDARD]]
    # about 144 of each; six standard deviations
    assert counts.min() > 144 - 72
    assert counts.max() < 144 + 72


def test_a_random_residue_is_never_the_one_it_stands_for() -> None:
    known = ALPHABETS["esm1nv"]
    tokens = known.encode(STANDARD * 500)
    seen, places = Masker("esm1nv", share=0.99, mask_token_share=0.0, random_share=1.0)(
        tokens, np.random.default_rng(1)
    )
    assert len(places) > 9_000
    assert not np.any(seen[places] == tokens[places])
