"""mixturelens: did post-training change the router or the specialists?"""
