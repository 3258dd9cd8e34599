"""Host-side data: sources, row shapes, the one encode path, packing, iteration.

Read in the order of the data: `specs` and `sources` (rows with file and line), `rows`
and `messages` (every row shape to one), `encode` (THE path from text to token ids, with
`turns`, `templates` and `pieces`), `prepare` (policies, counts, cache), `plan` and
`layout` (rows of fixed shape), `iterate` (order and position).
"""
