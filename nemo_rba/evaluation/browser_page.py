# SPDX-License-Identifier: Apache-2.0
"""The frame and the looks of ``samples.html``; what moves in it is ``browser_script.py``.

``PAGE`` is a ``string.Template``: title, style, script, digest (of the script, base64 of SHA-256: no other script may
run), identity (``<div>``s of a description list), data (JSON that cannot end its element).
"""

from nemo_rba.evaluation import document

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'sha256-$digest'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style></head>
<body>
<header>
<h1>$title</h1>
<p>Every item with what every system answered. <a href="#identity">Where this comes from</a> ·
<a href="report.html">The report</a></p>
</header>
<noscript><p><strong>This page needs JavaScript: it searches and filters here, on your machine.</strong></p></noscript>
<main>
<form id="controls" role="search" aria-label="Choose items">
<label class="wide">Search <input id="search" name="q" type="search" autocomplete="off" spellcheck="false"
 placeholder="words, &quot;a phrase&quot;" aria-describedby="search-hint"></label>
<p class="hint" id="search-hint">In what was said and heard, in answers, voices and ids; all words must occur.
 Key: <kbd>/</kbd></p>
<details id="filters" open><summary>Filters and order</summary>
<label>Condition <select name="condition"></select></label>
<label>Kind <select name="kind"></select></label>
<label>Family <select name="family"></select></label>
<label>Voice <select name="speaker"></select></label>
<fieldset><legend>Two systems</legend>
<label>A <select name="a"></select></label>
<label>B <select name="b"></select></label>
<div id="changes" role="radiogroup" aria-label="How B compares with A"></div>
<label class="tick"><input type="checkbox" name="pair" value="1"> show only A and B, side by side</label>
</fieldset>
<label class="tick"><input type="checkbox" name="sound" value="1"> only with sound <span id="num-sound"></span></label>
<label>Order <select name="sort">
<option value="">as in the set</option>
<option value="worst">B minus A, losses first</option>
<option value="best">B minus A, gains first</option>
<option value="low">score of B, worst first</option>
<option value="high">score of B, best first</option>
<option value="hard">hardest first, all systems</option>
</select></label>
<button type="reset">Start over</button>
</details>
</form>
<section aria-label="Items">
<p id="count" role="status"></p>
<ol id="items"></ol>
<button id="more" type="button" hidden></button>
</section>
</main>
<section id="identity"><h2>Where this comes from</h2>
<dl>
$identity</dl></section>
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body></html>
"""

STYLE = (
    document.STYLE
    + """
:root { color-scheme: light; --ink: #1f2328; --soft: #57606a; --line: #d8dee4; --faint: #f6f8fa; --blue: #0969a8; }
body { max-width: 84rem; margin: 2rem auto 4rem; }
header p { margin: 0 0 1.5rem; color: var(--soft); }
a { color: var(--blue); }
main { display: grid; grid-template-columns: 17.5rem minmax(0, 1fr); gap: 2.5rem; align-items: start; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
form { position: sticky; top: 0; max-height: 100vh; overflow-y: auto; padding: .75rem .25rem 1rem; font-size: .9rem; }
form label { display: block; margin: 0 0 .7rem; color: var(--soft); }
form input[type=search], form select { display: block; width: 100%; box-sizing: border-box; margin-top: .15rem;
       padding: .4rem .5rem; font: inherit; color: var(--ink); background: #fff; border: 1px solid #8c959f;
       border-radius: 6px; }
form .tick, #changes label { color: var(--ink); margin: 0 0 .3rem; display: flex; gap: .45rem; align-items: baseline; }
#changes { margin: .2rem 0 .7rem; }
#changes .number { margin-left: auto; color: var(--soft); font-variant-numeric: tabular-nums; }
.hint { margin: -.4rem 0 .9rem; color: var(--soft); font-size: .8rem; line-height: 1.4; }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 .35em; background: var(--faint); font: inherit; }
fieldset { border: 1px solid var(--line); border-radius: 8px; margin: 0 0 .9rem; padding: .5rem .75rem .4rem;
       min-width: 0; }
legend { padding: 0 .3rem; color: var(--soft); }
details > summary { display: none; }
button { font: inherit; font-size: .9rem; padding: .4rem .9rem; color: var(--ink); background: var(--faint);
       border: 1px solid #8c959f; border-radius: 6px; cursor: pointer; }
button:hover { background: #eaecef; }
#count { margin: .75rem 0 .5rem; color: var(--soft); max-width: none; }
#items { list-style: none; margin: 0; padding: 0; }
#items > li { max-width: none; padding: 1.1rem 0 1.3rem; border-top: 1px solid var(--line); }
#items h3 { font-size: 1.1rem; line-height: 1.35; margin: 0; overflow-wrap: anywhere; }
.meta, .context { margin: .15rem 0 .5rem; color: var(--soft); font-size: .85rem; max-width: none;
       overflow-wrap: anywhere; }
.sound { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: .5rem 0 .8rem; }
.sound audio { width: 17rem; max-width: 100%; }
.sound img { width: 24rem; }
.answers { width: 100%; font-size: .92rem; }
.answers th, .answers td { border-bottom: 1px solid #eaecef; padding: .4rem 1rem .4rem 0; font-weight: 400; }
.answers th { width: 13rem; color: var(--soft); }
.answers td.said, .card .said { white-space: pre-wrap; overflow-wrap: anywhere; }
.answers td.mark { width: 5.5rem; }
.answers tr.chosen th { color: var(--ink); font-weight: 600; }
.badge { display: inline-block; min-width: 1.25em; margin-right: .4em; border-radius: 4px; background: var(--ink);
       color: #fff; font-size: .75rem; font-weight: 600; text-align: center; }
.score { display: inline-block; padding: 0 .5em; border-radius: 1em; font-variant-numeric: tabular-nums;
       white-space: nowrap; color: #6b4300; background: linear-gradient(90deg, #f5e08c var(--share), #fff8c5 0); }
.score.right { background: #dafbe1; color: #116329; }
.score.wrong { background: #ffebe9; color: #a40e26; }
.score.none { background: var(--faint); color: var(--soft); }
.change { font-weight: 600; }
.change.better { color: #116329; }
.change.worse { color: #a40e26; }
.heard, .cut { display: block; margin-top: .2rem; color: var(--soft); font-size: .85rem; }
.heard del { color: #a40e26; }
.heard ins { color: #116329; font-weight: 600; text-decoration: none; border-bottom: 2px solid currentColor; }
.empty { color: var(--soft); font-style: italic; }
mark { background: #fff2a8; color: inherit; border-radius: 2px; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem .8rem; }
.card h4 { margin: 0 0 .4rem; font-size: .9rem; display: flex; gap: .5rem; align-items: baseline; }
.card h4 .score { margin-left: auto; font-weight: 400; }
.reference { margin: 0 0 .6rem; max-width: none; font-size: .92rem; }
.reference b { color: var(--soft); font-weight: 400; }
#more { margin: 1rem 0; }
.visually-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
       white-space: nowrap; }
#identity { margin-top: 3rem; border-top: 1px solid var(--line); }
#identity h2 { margin-top: 1.5rem; }
#identity dl > div { display: grid; grid-template-columns: 12rem minmax(0, 1fr); gap: 1rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0 0 .3rem; overflow-wrap: anywhere; }
@media (max-width: 60rem) {
  body { margin-top: 1.25rem; }
  main { grid-template-columns: minmax(0, 1fr); gap: 0; }
  form { position: static; max-height: none; padding: 0; }
  details > summary { display: list-item; margin: 0 0 .7rem; cursor: pointer; }
}
@media (max-width: 40rem) {
  .answers, .answers tbody { display: block; }
  .answers tr { display: grid; grid-template-columns: 1fr auto; gap: 0 .75rem; padding: .45rem 0;
       border-bottom: 1px solid #eaecef; }
  .answers th, .answers td { border: 0; padding: 0; width: auto; }
  .answers td.mark { width: auto; text-align: right; }
  .answers td.said { grid-column: 1 / -1; grid-row: 2; }
  .pair, #identity dl > div { grid-template-columns: minmax(0, 1fr); gap: .5rem; }
  #identity dl > div { gap: 0; margin-bottom: .5rem; }
}
@media print { form, #more { display: none; } main { display: block; } }
"""
)
