"""Uploads of small folders to the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

from vqt_jax.checkpoints import hub
from vqt_jax.errors import UserError


def upload(address: str, contents: Mapping[str, bytes], public: bool) -> str:
  """Write files into a model on the hub, in one commit.

  Args:
    address: `hf://OWNER/NAME`; is made if there is no such model.
    contents: name of a file -> content.
    public: whether everybody may read it, or only its owner.

  Returns:
    Its page.

  Raises:
    UserError: there is no token, the hub is not reached or refuses; the model
      has other files, or can be read by others than asked for.
  """
  name, revision = hub.parse(address)
  if revision:
    raise UserError(
      f"Cannot write {address}: expected hf://OWNER/NAME without @{revision},"
      " as the main branch is written."
    )
  with hub.quiet():
    import huggingface_hub

    if not huggingface_hub.get_token():
      raise UserError(
        f"Writing hf://{name} needs a token: run `hf auth login`, or set"
        " HF_TOKEN to one that may write."
      )
    try:
      _upload(name, contents, public)
    except UserError:
      raise
    except Exception as error:
      # Without its cause, which may show the token.
      raise _explain(error, name) from None
  return f"{hub.shown_endpoint()}/{name}"


def _upload(name: str, contents: Mapping[str, bytes], public: bool) -> None:
  """Upload; raise whatever the library raises."""
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  api, last = huggingface_hub.HfApi(), None
  try:
    found = api.model_info(name)
  except hub_errors.RepositoryNotFoundError:
    api.create_repo(name, private=not public)
  else:
    last = found.sha
    _check_found(found, contents, public)
  huggingface_hub.utils.disable_progress_bars()
  api.create_commit(
    name,
    [
      huggingface_hub.CommitOperationAdd(file, content)
      for file, content in contents.items()
    ],
    commit_message="Upload a bundle of vqt_jax",
    parent_commit=last,
  )


def _check_found(found: Any, contents: Mapping[str, bytes], public: bool):
  """Raise a `UserError` if a model there is not to be written over."""
  names = {each.rfilename for each in found.siblings or ()}
  others = sorted(names - {*contents, ".gitattributes"})
  if others:
    raise UserError(
      f"hf://{found.id} has other files ({others[0]}), among which a bundle"
      " would be lost: choose another name."
    )
  if bool(found.private) == public:
    is_, advice = ("private", "leave out") if public else ("public", "add")
    raise UserError(
      f"hf://{found.id} is {is_} already: {advice} --public, or change that at"
      f" {hub.shown_endpoint()}/{found.id}/settings."
    )


def _explain(error: Exception, name: str) -> UserError:
  """Return what is to be raised in place of an error of the library."""
  from huggingface_hub import errors as hub_errors

  endpoint = hub.shown_endpoint()
  status = getattr(getattr(error, "response", None), "status_code", None)
  if isinstance(error, hub_errors.OfflineModeIsEnabled):
    why = "HF_HUB_OFFLINE forbids it. Unset that once."
  elif status == 401:
    why = (
      "the token is refused (401). Run `hf auth login`, or set HF_TOKEN to one"
      " that has not expired."
    )
  elif status == 403:
    owner = name.partition("/")[0]
    why = (
      f"the token may not write there (403). Take one with the role `write`,"
      f" of a user who is {owner} or belongs to it."
    )
  elif status == 404:
    why = "there is no such owner, or no model any more (404). Check the name."
  elif status in (409, 412):
    why = (
      f"it is there already and not yours, or was changed just now ({status})."
      " Choose another name, or try again."
    )
  else:
    why = f"{hub.reason(error)} Try again: all files appear together."
  return UserError(f"Cannot write hf://{name} at {endpoint}: {why}")
