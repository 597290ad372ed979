"""Data-Juicer, Ray mode: near-duplicates by ray_bts_minhash_deduplicator, on the same shingles and bands as ours.

Five characters, whitespace aside, 128 permutations in 16 bands of 8 rows. It does not verify its candidates.
"""

import data_juicer_run

PROCESS = [
    {
        "ray_bts_minhash_deduplicator": {
            "tokenization": "character",
            "window_size": 5,
            "lowercase": False,
            "ignore_pattern": r"\s+",
            "num_permutations": 128,
            "jaccard_threshold": 0.8,
            "num_bands": 16,
            "num_rows_per_band": 8,
        }
    }
]

if __name__ == "__main__":
    data_juicer_run.main(__doc__, PROCESS)
