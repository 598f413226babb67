"""Messaging owns conversations, their members, messages and receipts.

It promises one dense, gapless order of events per conversation, the same for every device and every door; that a
message is stored before its sender is told so; and that nothing of a conversation reaches anyone outside it. It carries
ciphertext only and holds no key that opens it.
"""
