"""The paper's steps between the rows and the tokens (§3.2, App. A), each a function from records to records.

None of them depends on the order of the rows: which record of several is kept goes by a hash of content and seed.
`lit_rlhf.data.preprocessing.settings` puts them in order.
"""
