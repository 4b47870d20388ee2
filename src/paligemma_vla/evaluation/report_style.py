"""The report's style sheet: one type scale, one accent, light and dark."""

STYLE = """
:root {
  --bg: #f7f7f4; --panel: #fff; --ink: #191b1f; --soft: #5d636b; --line: #e3e3dd; --track: #ecece6; --accent: #2f5bd7;
  --quiet: #a9adb5; --good: #1c7d4a; --bad: #b93a32; --c0: #2f5bd7; --c1: #d9730d; --c2: #1c8a5a; --c3: #a33ea1;
  --c4: #b93a32; --c5: #0f8a9d; --c6: #8a6d1f; --c7: #6b7280;
  --shadow: 0 1px 2px rgb(0 0 0/.05), 0 4px 16px rgb(0 0 0/.04);
}
@media (prefers-color-scheme:dark) {
  :root {
    --bg: #121316; --panel: #1b1d21; --ink: #ebebe8; --soft: #9ba1aa; --line: #2b2e34; --track: #2a2d33;
    --accent: #86a5ff; --quiet: #666c76; --good: #4cc486; --bad: #f0837a; --c0: #86a5ff; --c1: #f4a259; --c2: #5fd09a;
    --c3: #d98be0; --c4: #f0837a; --c5: #5cc8d7; --c6: #d4b85a; --c7: #a3a9b3; --shadow: none;
  }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans",
    "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 56px }
h1 { font-size: 22px; line-height: 1.25; margin: 0; font-weight: 650; letter-spacing: -.012em }
h2 { font-size: 21px; line-height: 1.25; margin: 0; font-weight: 650; letter-spacing: -.012em }
h3 { font-size: 15px; margin: 28px 0 10px; font-weight: 650 }
h3 small { font-weight: 400; color: var(--soft); font-size: 14px; margin-left: 6px }
p { margin: 0 }
section { margin-top: 60px }
.lead { color: var(--soft); margin: 4px 0 20px; max-width: 96ch }
.sub { color: var(--soft); margin-top: 3px }
.note { color: var(--soft); font-size: 13px; margin-top: 10px }
.hero { display: grid; grid-template-columns: minmax(260px, 5fr) 7fr; gap: 40px; align-items: center; margin-top: 30px }
.hero.alone { grid-template-columns: 1fr }
.big { font-size: 92px; line-height: 1; font-weight: 680; letter-spacing: -.045em }
.big small { font-size: .5em; letter-spacing: 0; font-weight: 600; margin-left: .08em }
.hero > div > p { font-size: 17px; line-height: 1.45; margin-top: 12px; max-width: 40ch }
.hero > div > p.range { font-size: 14px; color: var(--soft) }
.hero .rate { margin-top: 18px; max-width: 360px; height: 18px }
.panel {
  background: var(--panel); border: 1px solid var(--line); border-radius: 12px; box-shadow: var(--shadow);
  padding: 16px 18px; margin: 0; min-width: 0;
}
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px }
.grid + .grid, .panel + .panel, .grid + .panel, .panel + .grid, .tiles + .grid, .grid + h3 { margin-top: 16px }
.grid > .panel { margin-top: 0 }
.tiles { display: flex; flex-wrap: wrap; gap: 14px 40px; margin: 0 0 22px }
.tiles dt { color: var(--soft); font-size: 13px }
.tiles dd { margin: 0; font-size: 22px; font-weight: 620; letter-spacing: -.015em; line-height: 1.25 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px }
.cards .panel { margin: 0 }
.cards b.name { font-weight: 620 }
.cards .value { font-size: 30px; font-weight: 650; letter-spacing: -.025em; line-height: 1.15; margin-top: 4px }
.cards .value small { font-size: 13px; font-weight: 400; letter-spacing: 0; color: var(--soft); margin-left: 8px }
.cards .note { margin-top: 10px; line-height: 1.42 }
.want {
  float: right; font-size: 12px; color: var(--soft); border: 1px solid var(--line); border-radius: 99px;
  padding: 0 8px; line-height: 20px;
}
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit }
svg .axis { stroke: var(--line); stroke-width: 1 }
svg polyline { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round }
svg .raw { opacity: .28; stroke-width: 1 }
.rate { height: 10px; margin-top: 6px; width: 100% }
.rate .track { fill: var(--track) }
.rate .bar { fill: var(--accent) }
.rate.low .bar { fill: var(--quiet) }
.rate .whisker { stroke: var(--ink); stroke-width: 1.5; vector-effect: non-scaling-stroke }
.rate .mark { stroke: var(--ink); stroke-width: 2; vector-effect: non-scaling-stroke }
.c0 { stroke: var(--c0) }
.c1 { stroke: var(--c1) }
.c2 { stroke: var(--c2) }
.c3 { stroke: var(--c3) }
.c4 { stroke: var(--c4) }
.c5 { stroke: var(--c5) }
.c6 { stroke: var(--c6) }
.c7 { stroke: var(--c7) }
.true { stroke: var(--quiet) }
svg .true { stroke-width: 3.5; opacity: .6 }
.odd { stroke: var(--c0) }
.even { stroke: var(--c1) }
circle.odd { fill: var(--c0); stroke: none }
circle.even { fill: var(--c1); stroke: none }
rect.column { fill: var(--c0) }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; margin-bottom: 10px; font-size: 14px }
figcaption b { font-weight: 620 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; color: var(--soft); font-size: 12.5px }
.legend i {
  display: inline-block; width: 14px; height: 0; border-top: 2.5px solid; vertical-align: middle; margin-right: 5px;
}
.legend .c0 { color: var(--c0) }
.legend .c1 { color: var(--c1) }
.legend .c2 { color: var(--c2) }
.legend .c3 { color: var(--c3) }
.legend .c4 { color: var(--c4) }
.legend .c5 { color: var(--c5) }
.legend .c6 { color: var(--c6) }
.legend .c7 { color: var(--c7) }
.legend .true { color: var(--quiet) }
.legend .mark { width: 0; height: 12px; border-top: 0; border-left: 2.5px solid var(--ink) }
.scroll { overflow-x: auto; padding: 4px 18px }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th { font-weight: 500; color: var(--soft); font-size: 13px; text-align: left; vertical-align: bottom; line-height: 1.3 }
th, td { padding: 9px 10px; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { padding-left: 0 }
th:last-child, td:last-child { padding-right: 0 }
tr:last-child th, tr:last-child td { border-bottom: 0 }
tbody th { color: var(--ink); font-size: 14px; font-weight: 520; vertical-align: middle; white-space: nowrap }
td.n, th.n { text-align: right; white-space: nowrap }
td.w { width: 34% }
td.w .rate { margin: 0 }
.rates td { min-width: 104px }
.rates td > span { color: var(--soft); font-size: 12.5px; float: right; line-height: 1.7 }
.rates td b { font-weight: 620 }
tr.total th, tr.total td { border-top: 2px solid var(--line); font-weight: 620 }
tr.used th::after {
  content: "used"; font-size: 11.5px; color: var(--accent); border: 1px solid currentColor; border-radius: 99px;
  padding: 0 6px; margin-left: 8px;
}
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 150px), 1fr)); gap: 16px 12px }
.hero .films { grid-template-columns: repeat(3, 1fr); gap: 10px }
.hero .films.two { grid-template-columns: repeat(2, 1fr) }
.hero .films.one { grid-template-columns: 1fr }
.film { margin: 0; min-width: 0 }
.film video, .film img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 10px; background: var(--track);
}
.film figcaption { display: block; font-size: 13px; line-height: 1.35; margin: 7px 0 0; color: var(--soft) }
.film b { color: var(--ink) }
.film .yes, .film .no { white-space: nowrap }
.film .yes { color: var(--good) }
.film .no { color: var(--bad) }
.strip { display: grid; grid-template-columns: repeat(8, 1fr); gap: 4px; margin-top: 2px }
.strip img, .strip i { display: block; width: 100%; aspect-ratio: 1; border-radius: 5px; object-fit: cover }
.strip i { background: var(--track) }
.strip + .strip { margin-top: 4px }
.strip + svg { margin-top: 12px }
.words { list-style: none; margin: 0; padding: 0; columns: 2 320px; column-gap: 36px; font-size: 14px }
.words li {
  display: flex; justify-content: space-between; gap: 12px; padding: 4px 0; border-bottom: 1px solid var(--line);
  break-inside: avoid;
}
.words span { color: var(--soft) }
.dims { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px 28px }
.dims h4 { margin: 0 0 2px; font-size: 12.5px; font-weight: 520; color: var(--soft) }
.stages { display: flex; height: 14px; border-radius: 7px; overflow: hidden; gap: 2px; margin: 2px 0 10px }
.stages i { min-width: 3px }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; margin: 0; font-size: 14px }
.facts dt { color: var(--soft) }
.facts dd { margin: 0; overflow-wrap: anywhere }
details { margin-top: 16px }
summary { cursor: pointer; color: var(--soft); font-size: 14px }
pre {
  overflow-x: auto; font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  margin: 12px 0 0;
}
footer { margin-top: 56px; color: var(--soft); font-size: 13px }
@media (max-width:760px) {
  main { padding: 24px 16px 40px }
  section { margin-top: 44px }
  .hero { grid-template-columns: 1fr; gap: 26px; margin-top: 22px }
  .big { font-size: 76px }
  .cards { grid-template-columns: repeat(2, 1fr); gap: 10px }
  .panel { padding: 14px }
  .stack, .stack tbody, .stack tr, .stack th, .stack td { display: block; width: auto; min-width: 0 }
  .stack thead { display: none }
  .stack tr { padding: 12px 0; border-bottom: 1px solid var(--line) }
  .stack tr:last-child { border: 0 }
  .stack th, .stack td { border: 0!important; padding: 0 }
  .stack td { display: grid; grid-template-columns: 8.6em 3em 1fr 3.2em; gap: 8px; align-items: center; padding-top: 5px }
  .stack td::before { content: attr(data-label); color: var(--soft); font-size: 12.5px; line-height: 1.2 }
  .stack td .rate { margin: 0; order: 1 }
  .stack td > span { float: none; order: 2; text-align: right }
  .stack tr.total { border-top: 2px solid var(--line) }
  .facts { grid-template-columns: 1fr; gap: 0 }
  .facts dd { margin-bottom: 8px }
  .scroll { padding: 4px 14px }
  .tiles { gap: 12px 28px }
}
@media (max-width:600px) {
  .hero .films { grid-template-columns: repeat(2, 1fr) }
  .cards { grid-template-columns: 1fr }
}
@media print {
  section { break-inside: avoid }
  .panel { box-shadow: none }
}
"""
