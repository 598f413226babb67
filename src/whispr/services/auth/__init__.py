"""auth owns who people are and what they hold: accounts, credentials, devices, sessions, prekeys and push tokens.

It promises that a password is only ever kept as an argon2id hash, that a refresh token works once and its reuse ends
the family, that a one-time prekey is handed out at most once, that push tokens lie encrypted, that a revocation is on
its way to every process when the call that made it returns, and that every security event is in a tamper-evident trail.
"""
