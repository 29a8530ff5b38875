"""The only importer of transformer_lens: bridge, capture, interventions, and the exact patch engine."""
