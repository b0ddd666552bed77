"""Envoy's filters beside ours: they read a body's fields and forms before it, and show the first byte behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.envoy.skeleton import EXT_PROC_CLUSTER, FILTERS, lines
from extproc.stream import wire
from extproc.stream.request import MAX_NAME, MAX_SEQUENCES

if TYPE_CHECKING:
    from extproc.config import Config

PROBE = "first-byte-probe"
JSON_FIELDS, FORMS = "envoy.filters.http.json_to_metadata", "envoy.filters.http.lua"
_FIELDS = (
    *("model", "max_tokens", "max_completion_tokens", "n", "best_of", "user", "safety_identifier"),
    *("prompt_cache_key", "service_tier", "priority"),
)


def lua_filter(name: str, source: str) -> str:
    """Return a filter that runs `source`."""
    return f"""\
          - name: {name}
            typed_config:
              "@type": {FILTERS}lua.v3.Lua
              default_source_code:
                inline_string: |
{lines(18, source.splitlines())}"""


def request_fields(config: Config) -> str:
    """Return the filters that read bodies, before ours; "": none is wanted."""
    if not config.request_fields:
        return ""
    space = wire.FIELDS_NAMESPACE
    rules = [
        f"- {{selectors: [{{key: '{key}'}}], on_present: {{metadata_namespace: {space}, key: '{key}'}}}}"
        for key in _FIELDS
    ]
    return f"""\
          # The model of a form, as for audio/transcriptions; how many prompts a list has: the filter below drops lists.
{lua_filter(FORMS, _PROMPTS + _FORM_MODEL)}\
          # Reads fields of the JSON body; a compressed one it can't.
          # Its response rules, and the sse_to_metadata filter, are left alone: in 1.40 one engine event crashes Envoy.
          - name: {JSON_FIELDS}
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.json_to_metadata.v3.JsonToMetadata
              request_rules:
                # By default "application/json; charset=utf-8" would not be read, nor capitals, which mean the same.
                allow_content_types_regex: {{regex: "(?i)application/json(\\\\s*;.*)?"}}
                allow_empty_content_type: true
                rules:
{lines(16, rules)}"""


MOST_BYTES, MOST_STEPS = 64 << 10, 16 << 10
"""So much of a body is looked at for its prompts, and so many of its quotes and brackets: whatever a client sends, it
takes Envoy's worker a millisecond at the most."""
_PROMPTS = (
    """\
-- How many prompts a body has: strings and lists right inside its list "prompt" or "input". A list of numbers is one.
function prompts_of(text)
  local at, depth, most, count, last, listed = 1, 0, 0, 0, "", false
  for _ = 1, MOST_STEPS do
    at = text:find('[%[%]{}"]', at)
    if not at then break end
    local mark, stop = text:byte(at), at
    if mark == 34 then
      repeat stop = text:find('"', stop + 1, true)
        local slash = stop and stop - 1
        while slash and text:byte(slash) == 92 do slash = slash - 1 end
      until not stop or (stop - slash) % 2 == 1
      if not stop then
        if listed and depth == 2 then count = count + 1 end
        break
      end
      if depth == 1 then last = text:sub(at + 1, stop - 1) end
      if listed and depth == 2 then count = count + 1 end
    elseif mark == 91 or mark == 123 then
      if listed and depth == 2 and mark == 91 then count = count + 1 end
      if depth == 1 then listed = mark == 91 and (last == "prompt" or last == "input") end
      depth = depth + 1
    else
      depth = depth - 1
      if depth == 1 then listed = false end
    end
    if depth == 1 or count >= MAX_SEQUENCES then most, count = math.max(most, count), 0 end
    if most >= MAX_SEQUENCES then break end
    at = stop + 1
  end
  return math.max(most, count)
end
function note_prompts(handle)
  local path = (handle:headers():get(":path") or ""):match("^[^?]*")
  local is_text = path:find("/completions", 1, true) and not path:find("/chat/", 1, true)
  if not is_text and not path:find("/embeddings", 1, true) then return end
  local kind = handle:headers():get("content-type") or ""
  local body = (kind == "" or kind:lower():find("^application/json")) and handle:body()
  if not body then return end
  local count = prompts_of(body:getBytes(0, math.min(body:length(), MOST_BYTES)))
  if count > 1 then
    handle:streamInfo():dynamicMetadata():set("FIELDS", "PROMPTS", count)
  end
end
""".replace("MOST_BYTES", str(MOST_BYTES))
    .replace("MOST_STEPS", str(MOST_STEPS))
    .replace("MAX_SEQUENCES", str(MAX_SEQUENCES))
    .replace("FIELDS", wire.FIELDS_NAMESPACE)
    .replace("PROMPTS", wire.PROMPTS)
)
_FORM_MODEL = f"""\
function envoy_on_request(handle)
  note_prompts(handle)
  local kind = handle:headers():get("content-type") or ""
  if not kind:lower():find("^multipart/form%-data") then return end
  local mark = kind:match('[Bb]oundary="([^"]+)"') or kind:match("[Bb]oundary=([^;%s]+)")
  local body = mark and handle:body()
  if not body then return end
  local text = body:getBytes(0, body:length())
  mark = "--" .. mark
  local at = text:find(mark, 1, true)
  while at do
    local head_end = text:find("\\r\\n\\r\\n", at, true)
    local after = head_end and text:find("\\r\\n" .. mark, head_end + 2, true)
    if not after then return end
    local head = text:sub(at, head_end)
    if head:find(';%s*name="model"') or head:find(";%s*name=model[;\\r]") then
      local model = text:sub(head_end + 4, after - 1)
      if #model <= {MAX_NAME} then
        handle:streamInfo():dynamicMetadata():set("{wire.FIELDS_NAMESPACE}", "model", model)
      end
      return
    end
    at = after + 2
  end
end
"""


def first_byte_probe(config: Config) -> str:
    """Return the filter that shows us the first piece of each answer, behind ours; "": none is wanted."""
    if not config.first_byte_probe:
        return ""
    return f"""\
          # Shows the sidecar the first piece of each answer, and nothing more: the sidecar ends the stream at once.
          # failure_mode_allow: false would cut the answer when no sidecar is there.
          - name: {PROBE}
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              stat_prefix: probe
              grpc_service: {{envoy_grpc: {{cluster_name: {EXT_PROC_CLUSTER}, skip_envoy_headers: true}}, timeout: 0s}}
              observability_mode: true
              failure_mode_allow: true
              allow_content_length_header: true
              deferred_close_timeout: 0.1s
              processing_mode:
                request_header_mode: SKIP
                response_header_mode: SKIP
                request_body_mode: NONE
                response_body_mode: STREAMED
                request_trailer_mode: SKIP
                response_trailer_mode: SKIP
              # Our own number of the request, from the answer of the filter above: no header of a client's can be it.
              metadata_options:
                forwarding_namespaces: {{untyped: [{wire.NUMBER_NAMESPACE}]}}
"""
