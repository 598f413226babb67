"""End-to-end encryption: X3DH and the Double Ratchet between two devices, sender keys for groups.

Everything here is synchronous and free of I/O but for the local store, so that one store transaction can hold a
ratchet step together with the message it belongs to.
"""
