"""The core, unchanged, on a virtual clock against simulated engines: what would a policy do with this traffic?"""
