"""The user service: profiles, contacts, blocks, privacy, quotas and activity reports.

It owns what people say about themselves and about each other, and nothing about how they sign in (that is `auth`) or
what they write (that is `messaging`). It promises that nobody learns of a block from it, that an erased person never
comes back by a late request, and that stored bytes are never counted below zero or above their limit.
"""
