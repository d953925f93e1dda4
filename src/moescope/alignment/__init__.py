"""The core: can one expert imitate another, up to a change of input?"""
