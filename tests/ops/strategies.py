"""Options of cases as hypothesis draws them."""

from __future__ import annotations

from cases import DTYPES, INNER, ROWS, Options
from hypothesis import strategies as st


@st.composite
def options(draw: st.DrawFn) -> Options:
    c_dtype, x_dtype = draw(st.sampled_from(DTYPES))
    contrast = draw(st.booleans())
    return Options(
        rhs=draw(st.sampled_from([2, 4] if contrast else [1, 2, 3])),
        batch=draw(st.integers(0, 3)),
        inner=draw(st.sampled_from(INNER)),
        rows=draw(st.sampled_from(ROWS)),
        c_dtype=c_dtype,
        x_dtype=x_dtype,
        contrast=contrast,
        seed=draw(st.integers(0, 2**31)),
        zeros=draw(st.booleans()),
    )
