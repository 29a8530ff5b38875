"""The proving ground: pairs and organisms whose truth is known, and how every instrument scores on them."""
