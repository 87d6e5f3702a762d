from __future__ import annotations

from pydantic import Field, SecretStr

from shared.settings import Settings


class AdminSettings(Settings):
    admin_token: SecretStr | None = Field(
        None, description="what opens the admin page and API; required, 16 characters"
    )
