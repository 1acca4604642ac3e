"""Prefix tuning and prompt tuning: virtual tokens before the text."""
