"""How report.html looks: light and dark by the reader's setting, one column on a phone. No font and no file from elsewhere."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1d1f23; --soft: #62676f; --rule: #e2e2dc; --track: #ebebe6;
  --right: #14803f; --wrong: #8f949c; --miss: #b23a2a;
  --c0: #2563c9; --c1: #c4620a; --c2: #0f8a78; --c3: #8c45b8; --c4: #7a6a1d; --c5: #b8336a; --c6: #9aa0a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121316; --card: #1b1d21; --ink: #e9e9e6; --soft: #a0a5ad; --rule: #30333a; --track: #2a2d33;
    --right: #45c479; --wrong: #767b84; --miss: #f0836f;
    --c0: #79a8ff; --c1: #f0a04b; --c2: #4fd0bc; --c3: #cf97f2; --c4: #d5c46a; --c5: #f58bb4; --c6: #6d737c;
  }
}
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); } .s4 { --c: var(--c4); }
.s5 { --c: var(--c5); } .s6 { --c: var(--c6); }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 48px 0 4px; }
h3 { font-size: 1rem; margin: 28px 0 10px; }
p { margin: 0 0 14px; max-width: 75ch; }
.soft, .facts { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: 2px 20px; margin: 0; padding: 0; list-style: none; font-size: 0.9rem; }
.facts b { color: var(--ink); font-weight: 600; }
.card, .chart, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card { padding: 16px 18px; }

.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(290px, 100%), 1fr)); gap: 16px; margin-top: 24px; }
.headline h2 { font-size: 0.95rem; font-weight: 600; margin: 0 0 8px; }
.headline .big { font-size: 2.6rem; line-height: 1.1; font-weight: 650; letter-spacing: -0.02em; }
.headline .big small { font-size: 1rem; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.bars { display: grid; grid-template-columns: auto 1fr auto auto; gap: 6px 10px; align-items: center; margin-top: 12px; }
.bars { font-size: 0.9rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars > span + small, .bars > .bar + span { text-align: right; }
.bars small { color: var(--soft); }
.bar { height: 8px; border-radius: 4px; background: var(--track); overflow: hidden; min-width: 40px; }
.bar i { display: block; height: 100%; background: var(--c0); }
.foot { margin: 12px 0 0; font-size: 0.85rem; color: var(--soft); }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 16px; margin-top: 14px; }
.chart { margin: 0; padding: 12px 12px 6px; min-width: 0; }
.chart svg { display: block; width: 100%; height: auto; max-width: 560px; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; padding: 0 4px 4px; }
.chart figcaption { font-size: 0.95rem; }
.chart b { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 0.85rem; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: var(--c); }
.key::before { margin-right: 5px; vertical-align: 4px; }
.key.dashed::before { background: none; height: 0; border-top: 2px dashed var(--soft); border-radius: 0; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.tick { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.reference { stroke: var(--soft); stroke-dasharray: 5 4; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.band { fill: var(--c); opacity: 0.18; }
.layer { fill: var(--c); stroke: var(--card); stroke-width: 0.5; }
.mark { stroke: var(--soft); stroke-dasharray: 2 3; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.stop rect { fill: transparent; } .stop line { stroke: var(--soft); } .stop line, .stop .dot { opacity: 0; }
.stop:hover line, .stop:hover .dot { opacity: 1; }
.split { display: flex; height: 22px; border-radius: 5px; overflow: hidden; margin: 8px 0; gap: 2px; }
.split i { background: var(--c); }
.wide { grid-column: 1 / -1; }

.queries { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 16px; }
.query { padding: 14px 16px; min-width: 0; }
.query blockquote { margin: 0 0 2px; font-weight: 600; line-height: 1.35; overflow-wrap: anywhere; }
.verdict { font-size: 0.88rem; margin: 0 0 10px; color: var(--soft); }
.verdict.hit { color: var(--right); } .verdict.missed { color: var(--miss); }
.shots { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 8px; margin: 0; padding: 0; list-style: none; }
.shot { min-width: 0; font-size: 0.8rem; text-align: center; color: var(--soft); font-variant-numeric: tabular-nums; }
.shot img, .picture { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px; }
.shot img, .picture { background: var(--track); }
.shot img { border: 2px solid transparent; padding: 1px; }
.shot.right img { border: 4px solid var(--right); padding: 0; }
.shot.wanted img { border: 3px dashed var(--right); padding: 0; }
.shot.right, .shot.wanted { color: var(--right); font-weight: 600; }
.reverse { display: grid; grid-template-columns: 120px 1fr; gap: 14px; }
.reverse ol { margin: 0; padding: 0; list-style: none; font-size: 0.92rem; line-height: 1.35; }
.reverse li { display: grid; grid-template-columns: 3.2em 1fr; padding: 3px 0; color: var(--soft); overflow-wrap: anywhere; }
.reverse li.right, .reverse li.wanted { color: var(--right); font-weight: 600; }
.reverse li.wanted { border-top: 1px dashed var(--right); margin-top: 4px; padding-top: 6px; }
.mark { font-weight: 700; } .legend-line .mark { margin-right: 2px; }
.legend-line { display: flex; flex-wrap: wrap; gap: 2px 18px; max-width: none; font-size: 0.9rem; color: var(--soft); }
.query > .picture { max-width: 220px; margin-bottom: 8px; aspect-ratio: auto; }
.query > p { margin: 4px 0 0; overflow-wrap: anywhere; } .query > p.right, .query > p.wanted { color: var(--right); }
.query > p.wrong { color: var(--miss); }
.legend-line .right, .legend-line .wanted { color: var(--right); }

.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 16px; align-items: start; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
td:last-child, th:last-child { text-align: right; padding-right: 0; }
td .picture { width: 44px; }
td .bar { width: 90px; }
.tables .card { overflow-x: auto; }
.card > h3 { margin-top: 0; }

details { margin-top: 10px; padding: 10px 16px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 0.85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 10px 0 4px; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.92em; }
@media (max-width: 560px) {
  main { padding: 20px 14px 40px; }
  h1 { font-size: 1.5rem; }
  .shots { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .reverse { grid-template-columns: 1fr; }
  .reverse .picture { width: 120px; }
}
"""
