# SPDX-License-Identifier: Apache-2.0
"""The look of a report: one style sheet, for a phone first, in light and dark mode."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #16202b; --quiet: #5a6775; --rule: #dfe4ea; --band: #eef2f6;
  --accent: #1667c1; --good: #0b7a5b; --good-soft: #e2f4ee; --bad: #b4420b; --bad-soft: #fcebe0;
  --open-soft: #eef1f5;
  --series-0: #1667c1; --series-1: #e08a1e; --series-2: #0b8a6a; --series-3: #b0467f;
  --series-4: #59a5d8; --series-5: #8a6d3b; --series-6: #7460c2; --series-7: #8b97a5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f151c; --card: #18212b; --ink: #e6edf4; --quiet: #9aa9b8; --rule: #2b3845; --band: #202c38;
    --accent: #6cb2ff; --good: #4fd0a5; --good-soft: #12332b; --bad: #ff9d66; --bad-soft: #3a2417;
    --open-soft: #22303d;
    --series-0: #5aa5f5; --series-1: #f0a94b; --series-2: #3fbf97; --series-3: #de7fb0;
    --series-4: #93cdf3; --series-5: #bfa06a; --series-6: #a597ec; --series-7: #7d8b99;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
header { margin: 0 0 1.25rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em;
     overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; font-weight: 600; }
p { margin: 0 0 .7rem; max-width: 46rem; }
p:last-child { margin-bottom: 0; }
.quiet { color: var(--quiet); font-size: .9rem; }
.pill { display: inline-block; border: 1px solid var(--rule); background: var(--card); border-radius: 99px;
        padding: .1rem .7rem; margin: 0 .3rem .3rem 0; font-size: .85rem; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 1.1rem;
          margin: 0 0 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 1rem; }
.pair > div { min-width: 0; display: flex; flex-direction: column; }
.pair > div > section:last-child { flex: 1 0 auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.4rem 2rem; }
.findings { list-style: none; margin: 0 0 .8rem; padding: 0; display: grid; gap: .6rem; }
.findings li { border-left: 5px solid var(--quiet); background: var(--open-soft); border-radius: 8px;
               padding: .65rem .9rem; }
.findings .better { border-color: var(--good); background: var(--good-soft); }
.findings .worse { border-color: var(--bad); background: var(--bad-soft); }
.findings:last-child, .strip:last-child { margin-bottom: 0; }
.findings strong { display: block; }
.findings .better strong { color: var(--good); }
.findings .worse strong { color: var(--bad); }
.findings span { font-size: .9rem; }
svg { display: block; width: 100%; max-width: 36rem; height: auto; overflow: visible; font: inherit; }
svg text { fill: var(--ink); font-size: 13px; }
svg .tick { fill: var(--quiet); font-size: 11.5px; }
svg .label { font-weight: 500; }
svg .label, svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 5px; stroke-linejoin: round; }
svg .value { font-weight: 650; font-variant-numeric: tabular-nums; }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .zero { stroke: var(--quiet); stroke-width: 1.5; }
svg .change { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 3 3; opacity: .6; }
svg .whisker { stroke: var(--accent); stroke-width: 2.5; stroke-linecap: round; }
svg .dot { fill: var(--accent); stroke: var(--card); stroke-width: 2; }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
svg .band { fill: var(--band); }
svg .hit { fill: var(--good); }
svg .miss { fill: none; stroke: var(--bad); stroke-width: 2; stroke-linecap: round; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .5rem;
       vertical-align: -.05rem; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--rule);
         vertical-align: top; }
th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
code { font: .85em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
td code { white-space: nowrap; overflow-wrap: normal; }
.strip { display: flex; gap: .6rem; overflow-x: auto; padding-bottom: .5rem; margin: 0 0 1rem;
         scroll-snap-type: x proximity; }
.strip figure { margin: 0; flex: 0 0 auto; width: clamp(7.5rem, 27vw, 9.6rem); scroll-snap-align: start; }
.strip img { display: block; width: 100%; border-radius: 8px; border: 1px solid var(--rule); }
.strip figcaption { font-size: .8rem; color: var(--quiet); margin-top: .2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; margin: 0; font-size: .9rem; }
dt { color: var(--quiet); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) {
  main { padding: 1rem .6rem 2rem; }
  section { padding: .9rem; border-radius: 12px; }
  svg text { font-size: 14px; }
  svg .tick { font-size: 13px; }
  th, td { padding-right: .55rem; }
  table { font-size: .85rem; }
}
@media print { section { break-inside: avoid; } }
"""
