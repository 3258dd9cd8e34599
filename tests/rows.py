"""What stand-ins for a model may read of a row, slowly."""

import numpy as np


def read_at(sequences, row, column):
    """[T], True on the tokens of the sequence that has a token at this column: those of
    its segment, and of the prompt that it shares."""
    segment = np.asarray(sequences.segment[row])
    mine = segment == segment[column]
    if sequences.prefix is not None and sequences.prefix[row, column]:
        mine |= segment == sequences.prefix[row, column]
    return mine
