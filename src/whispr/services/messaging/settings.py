"""Messaging's own options, `WHISPR_MESSAGING_…`."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic_settings import SettingsConfigDict

from whispr.kit.live import LiveSettings
from whispr.kit.settings import ServiceSettings, split_bind


class MessagingLive(LiveSettings):
    """What may change while messaging runs."""

    typing: bool = True
    presence: bool = True
    receipts: bool = True
    reactions: bool = True
    scheduled_messages: bool = True
    message_rate: PositiveFloat | None = None
    message_burst: PositiveInt | None = None
    user_rate: PositiveFloat | None = None
    user_burst: PositiveInt | None = None
    member_rate: PositiveFloat | None = None
    member_burst: PositiveInt | None = None
    conversation_rate: PositiveFloat | None = None
    conversation_burst: PositiveInt | None = None
    read_rate: PositiveFloat | None = None
    read_burst: PositiveInt | None = None
    conversations_per_hour: PositiveInt | None = None
    additions_per_hour: PositiveInt | None = None
    retention_days: NonNegativeInt | None = None


class MessagingSettings(ServiceSettings):
    """What a messaging process reads beside the common options."""

    model_config = SettingsConfigDict(env_prefix="WHISPR_MESSAGING_", extra="ignore")

    socket_bind: str = "127.0.0.1:0"
    max_sockets: int = Field(default=20_000, ge=1, description="Of this process.")
    max_channels: int = Field(default=1_000, ge=1, description="Joined on one socket.")
    message_rate: float = Field(
        default=20, gt=0, description="Messages a second from one device, in the long run."
    )
    message_burst: int = Field(default=200, ge=1, description="Messages one device may send at once.")
    user_rate: float = Field(default=30, gt=0, description="Messages a second from one person.")
    user_burst: int = Field(default=300, ge=1)
    member_rate: float = Field(
        default=20, gt=0, description="Messages a second from one person in one conversation."
    )
    member_burst: int = Field(default=200, ge=1)
    conversation_rate: float = Field(default=200, gt=0, description="Messages a second in one conversation.")
    conversation_burst: int = Field(default=2_000, ge=1)
    abnormal_messages_per_minute: int = Field(
        default=1_500, ge=0, description="Who sends more is restricted for a while; 0: nobody is."
    )
    abnormal_messages_per_hour: int = Field(default=15_000, ge=0)
    abnormal_approaches_per_minute: int = Field(
        default=60,
        ge=0,
        description="Conversations begun with people who do not have the person among their contacts.",
    )
    abnormal_approaches_per_hour: int = Field(default=150, ge=0)
    restriction_minutes: float = Field(default=60, gt=0, description="How long a restriction lasts.")
    read_rate: float = Field(default=20, gt=0, description="Joins and syncs a second of one device.")
    read_burst: int = Field(default=1_000, ge=1, description="Joins and syncs of one device at once.")
    signature_processes: int = Field(
        default=1, ge=0, le=16, description="Helpers that check signatures; 0: this process does."
    )
    cached_conversations: int = Field(default=20_000, ge=1)
    cached_members: int = Field(default=500_000, ge=1, description="Over all cached conversations.")
    receipt_detail_days: int = Field(
        default=30, ge=1, description="Later, times of receipts are exact to the day."
    )
    cursor_days: int = Field(
        default=180, ge=1, description="A device silent for longer is served like a new one."
    )
    retention_days: int = Field(
        default=0, ge=0, le=36_500, description="Messages older than this are purged; 0 keeps them."
    )
    usage_threshold: int = Field(
        default=10, ge=2, description="Numbers about fewer people are left out of usage reports."
    )
    report_days: int = Field(default=365, ge=1, description="How long a report is kept here.")
    scheduled_grace_seconds: float = Field(
        default=10,
        ge=0,
        le=3600,
        description="How late a scheduled message may be before it is sent without being asked by scheduling.",
    )
    scheduled_days: int = Field(
        default=30,
        ge=1,
        description="How long a scheduled message is listed after it was sent or has failed.",
    )
    outbox_hours: float = Field(
        default=24, gt=0, description="A notification that waited longer helps nobody."
    )

    @field_validator("socket_bind")
    @classmethod
    def _is_host_and_port(cls, value: str) -> str:
        split_bind(value)
        return value
