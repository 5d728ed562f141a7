"""Hostile templates: what reaches for Python is refused and not executed, bombs are stopped soon and in any thread."""

import threading
import time

import jinja2
import pytest

from torchft.data.chat_template import ChatTemplate
from torchft.data.limits import BUDGET, LimitExceeded
from torchft.data.tracked import to_text
from torchft.errors import UserError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [{"role": "user", "content": "  Hi <|im_end|> there\n"}, {"role": "assistant", "content": "Yes.\nNo "}]


def render(source: str, messages=None, tools=None, **variables):
    return ChatTemplate(source, SPECIAL).render(messages or CHAT, tools, **variables)


# -----------------------------------------------------------------------------------------------------

PAYLOADS = """
{{ ''.__class__ }}
{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ ''['__class__'] }}
{{ '' | attr('__class__') }}
{{ messages[0].content.__class__ }}
{{ messages[0]['content']['__class__'] }}
{{ messages[0].content._runs }}
{{ messages[0].__init__.__globals__ }}
{{ messages.__class__.__base__ }}
{{ messages.append(1) }}
{{ messages[0].update({'x': 1}) }}
{{ messages[0].pop('content') }}
{{ messages.clear() }}
{{ messages.sort() }}
{{ cycler.__init__.__globals__.os.getcwd() }}
{{ cycler.__init__.__globals__['os'].popen('id').read() }}
{{ joiner.__init__.__globals__.os.system('touch CANARY') }}
{{ namespace.__init__.__globals__.os }}
{{ namespace.__globals__ }}
{{ dict.__globals__ }}
{{ dict.__class__ }}
{{ range.__class__ }}
{{ raise_exception.__globals__['__builtins__']['eval']('1') }}
{{ raise_exception.__code__ }}
{{ strftime_now.__globals__ }}
{{ self.__init__.__globals__ }}
{{ self._TemplateReference__context.cycler.__init__.__globals__.os }}
{{ self.__dict__ }}
{{ loop.__class__ }}{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}
{% macro m() %}{% endmacro %}{{ m.__globals__ }}
{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}
{% macro m() %}{% endmacro %}{{ m._environment }}
{{ '{0.__class__}'.format('') }}
{{ '{0.__class__.__mro__}'.format(1) }}
{{ '{x.__init__.__globals__}'.format(x=cycler) }}
{{ '{0[__class__]}'.format('') ~ ''.__class__ }}
{{ '{x.__class__}'.format_map({'x': 1}) }}
{{ ('{0.__cl' ~ 'ass__}').format('') }}
{{ '{0.__class__}' | attr('format') }}{{ ('{0.__class__}' | attr('format'))(1) }}
{{ ['__class__'] | map('attr') | list }}{{ [''] | map(attribute='__class__') | list }}
{{ ['x'] | map('attr', '__class__') | list }}
{{ ['x'] | selectattr('__class__') | list }}
{{ ['x'] | groupby('__class__') | list }}
{{ ['x'] | sort(attribute='__class__') }}
{{ ['x'] | sum(attribute='__class__') }}
{{ ['x'] | join(attribute='__class__') }}
{{ ['x'] | unique(attribute='__class__') | list }}
{{ ['x'] | min(attribute='__class__') }}
{{ (1).__class__ }}
{{ 1.0.__class__ }}
{{ true.__class__ }}
{{ none.__class__ }}
{{ [].__class__ }}
{{ {}.__class__ }}
{{ ().__class__ }}
{{ (messages | map('trim')).gi_frame }}
{{ (messages | map('trim')).gi_code }}
{{ messages[0].content.encode('utf-8') }}
{{ messages[0].content.maketrans('a', 'b') }}
{% set ns = namespace() %}{% set ns.__class__ = 1 %}
{% set ns = namespace(_x=1) %}
{% set ns = namespace({'__init__': 1}) %}
{% include '/etc/passwd' %}
{% import '/etc/passwd' as p %}
{% from '/etc/passwd' import p %}
{% extends '/etc/passwd' %}
{% autoescape true %}{{ messages[0].content }}{% endautoescape %}
{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}
{{ get_flashed_messages.__globals__ }}
{{ config.items() }}
{{ request.application.__globals__ }}
{{ url_for.__globals__ }}
{{ messages | pprint }}
{{ messages | random }}
{{ 'x' | xmlattr }}
{% debug %}
{% do messages.append(1) %}
{% trans %}x{% endtrans %}
""".strip().splitlines()

BOMBS = """
{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}
{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}
{% for a in range(10 ** 9) %}{% endfor %}
{% set ns = namespace(x='ab') %}{% for a in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}
{% set ns = namespace(x='ab') %}{% for a in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}
{% set ns = namespace(x=[1]) %}{% for a in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}
{% set n = namespace(x=1, y=2) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == n.y }}
{% set n = namespace(x=1) %}{% for a in range(99) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}
{% set n = namespace(x=messages[0].content) %}{% for a in range(99) %}{% set n.x = n.x.replace('', n.x) %}{% endfor %}
{% set ns = namespace(x='a,a') %}{% for a in range(99) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}
{% set ns = namespace(x='a b') %}{% for a in range(99) %}{% set ns.x = ns.x.join(ns.x) %}{% endfor %}
{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x.translate({97: ns.x * 9}) %}{% endfor %}
{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}
{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}
{% set ns = namespace(x='a\\n') %}{% for a in range(99) %}{% set ns.x = (ns.x * 2) | indent(9999) %}{% endfor %}
{{ 'a' * 10 ** 10 }}
{{ 10 ** 10 * 'a' }}
{{ messages[0].content * 10 ** 10 }}
{{ [0] * 10 ** 10 }}
{{ 9 ** (9 ** 9) }}
{% set ns = namespace(x=3) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}
{{ 'f' * 1000000 | int(0, 16) }}{{ ('f' * 1000000) | int(0, 16) }}
{{ 'a'.center(10 ** 10) }}
{{ 'a' | center(10 ** 10) }}
{{ messages[0].content.ljust(10 ** 10) }}
{{ 'a'.rjust(10 ** 10) }}
{{ 'a'.zfill(10 ** 10) }}
{{ ('\\t' * 1000).expandtabs(10 ** 9) }}
{{ '%10000000000d' % 1 }}
{{ '%*d' % (10 ** 10, 1) }}
{{ '%.9999999999f' % 1 }}
{{ '{:>9999999999}'.format(1) }}
{{ '{:>{}}'.format(1, 10 ** 10) }}
{{ '%9999999999d' | format(1) }}
{{ 'a\\nb' | indent(10 ** 10) }}
{{ 'a\\nb' | indent('x' * 100000) }}
{{ [1] | batch(10 ** 10, 0) | list }}
{{ [1] | slice(10 ** 10) | list }}
{{ 1.5 | round(10 ** 10) }}
{{ messages | tojson(indent=10 ** 10) }}
{{ range(99999) | map('center', 9999) | list | length }}
{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}
{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}
{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}
{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}
{% set ns = namespace(x='a') %}{% for a in range(99999) %}{% set ns.x = ns.x + 'a' * 99 %}{% endfor %}
""".strip().splitlines()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_template_that_reaches_for_python_is_refused(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = [dict(message) for message in CHAT]
    with pytest.raises(UserError):
        render(payload, chat)
    assert chat == CHAT
    assert not list(tmp_path.iterdir())  # nothing was executed


def test_there_are_fifty_payloads():
    assert len(PAYLOADS) >= 50


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_stopped_soon(bomb):
    start = time.thread_time()
    with pytest.raises(UserError):
        render(bomb)
    assert time.thread_time() - start < 5  # seconds; about 1 alone on a machine


def test_limits_hold_in_a_thread_and_end_with_the_render():
    caught: list[BaseException] = []

    def work() -> None:
        try:
            render(BOMBS[0])
        except UserError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "steps" in str(caught[0])
    with pytest.raises(UserError):
        render(BOMBS[0])
    assert BUDGET.steps == float("inf")
    BUDGET.start(0)
    with pytest.raises(LimitExceeded):
        to_text(["x" * 10_000_000])
    BUDGET.stop()


def test_a_big_row_is_no_bomb():
    big = [{"role": "user", "content": "word " * 400_000}, {"role": "assistant", "content": "é" * 1_000_000}]
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>' }}{% endfor %}"
    assert len(render(source, big).text) == 3_000_000 - 1 + len("<|user|><|assistant|>") + 2 * len("<|end|>")
    many = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 5_000
    assert render(source, many).text.count("<|end|>") == 10_000


def test_jinja_is_new_enough():
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)  # older ones have known escapes
