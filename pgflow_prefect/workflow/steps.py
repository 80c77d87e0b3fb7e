"""The steps that a file declares: their handlers, bindings and rules."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pgflow_prefect.bindings import AnyBinding
from pgflow_prefect.definitions.model import StepRules
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.handlers.task_options import TaskOptions, check_task_run_name
from pgflow_prefect.workflow.declaration import Declaration
from pgflow_prefect.workflow.module import UserModule

F = TypeVar("F", bound=Callable[..., Any])


class DeclaredSteps:
    """The steps of a workflow that its file declares."""

    def __init__(self, slug: str, module: UserModule) -> None:
        """Begin without steps.

        Args:
            slug: the workflow.
            module: the module that declares the steps.
        """
        self.slug = slug
        self._module = module
        self._handlers: dict[str, PythonHandler] = {}
        self._bindings: dict[str, AnyBinding] = {}
        self._after: dict[str, tuple[str, ...]] = {}
        self._rules: dict[str, StepRules] = {}
        self._task_options: dict[str, TaskOptions] = {}
        self._at_once: dict[str, int] = {}  # of maps that are bound

    def _register(
        self, slug: str | None, function: F, make_handler: Callable[[str, F], PythonHandler], declared: Declaration
    ) -> F:
        """Make a function the handler of a step, and return it."""
        step_slug = slug if slug is not None else getattr(function, "__name__", None)
        if step_slug is None:
            raise UsageError(f"{function!r} has no name of its own: name its step, @workflow.step('some-slug')")
        if step_slug in self._handlers and not self._is_run_again(self._handlers[step_slug].function, function):
            raise UsageError(f"step {step_slug!r} of workflow {self.slug!r} has two handlers: remove one")
        if self._handlers.pop(step_slug, None) is not None:
            self._after.pop(step_slug, None)
            self._rules.pop(step_slug, None)
            self._task_options.pop(step_slug, None)
        handler = make_handler(step_slug, function)
        known = [name for name in handler.arguments if name != "context"]
        check_task_run_name(step_slug, declared.task_options, known)
        self._note(step_slug, declared)
        self._handlers[step_slug] = handler
        return function

    def _bind(self, slug: str, binding: AnyBinding, declared: Declaration) -> None:
        if slug in self._bindings and not self._module.is_interactive:
            raise UsageError(f"step {slug!r} of workflow {self.slug!r} is bound twice: remove one")
        self._bindings[slug] = binding
        self._note(slug, declared)

    def _note(self, slug: str, declared: Declaration) -> None:
        """Note what the code says of a step, by its decorator or by `bind`: one of them."""
        if declared.rules.said:
            self._rules[slug] = declared.rules
        if declared.task_options.is_said:
            self._task_options[slug] = declared.task_options
        if declared.after:
            self._after[slug] = (*self._after.get(slug, ()), *declared.after)

    def _is_run_again(self, former: Callable[..., Any], function: Callable[..., Any]) -> bool:
        """Tell whether a cell that defines a handler was run again: it defines a function of the same name."""
        names = [getattr(each, "__qualname__", None) for each in (former, function)]
        return self._module.is_interactive and names[0] is not None and names[0] == names[1]

    @property
    def source(self) -> Path | None:
        """The file whose code made this object; None if no file did, for example in a notebook."""
        return self._module.source

    @property
    def bindings(self) -> Mapping[str, AnyBinding]:
        """The bindings that `bind` set, by step slug."""
        return dict(self._bindings)

    @property
    def after(self) -> Mapping[str, tuple[str, ...]]:
        """The steps that `after` names, by step slug: the step waits for them, too."""
        return dict(self._after)

    @property
    def step_handlers(self) -> dict[str, StepHandlers]:
        """The handlers and bindings of each step that this file knows, by step slug."""
        handlers, bindings, options = self.handlers, self._bindings, self._task_options
        source = self._module.relative_source  # asks the file system: once a run, not once a step
        return {
            slug: StepHandlers(
                slug,
                handlers.get(slug),
                bindings.get(slug),
                options.get(slug, TaskOptions()),
                self._at_once.get(slug),
                source,
            )
            for slug in {**handlers, **bindings}
        }

    @property
    def handlers(self) -> Mapping[str, PythonHandler]:
        """The handlers by step slug, without stubs."""
        return {slug: handler for slug, handler in self._handlers.items() if not handler.unimplemented}

    def find_function(self, slug: str) -> PythonHandler | None:
        """Return the function of a step, which may be a stub; None if this file has none."""
        return self._handlers.get(slug)

    @property
    def stubs(self) -> list[str]:
        """The slugs of the steps whose handler is still a stub."""
        return [slug for slug, handler in self._handlers.items() if handler.unimplemented]

    @property
    def known_steps(self) -> list[str]:
        """The slugs of the steps that this file knows: those with a function or a stub, and those that `bind` binds."""
        return list(dict.fromkeys([*self._handlers, *self._bindings]))
