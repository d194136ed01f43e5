"""The one style sheet of reports and charts: light, and dark where the reader's device is."""

STYLE = """
.stagerun{--ink:#1c2128;--faint:#59636e;--line:#d1d9e0;--paper:#ffffff;--panel:#f6f8fa;--band:#eef1f4;
--c0:#2f6fc0;--c1:#b85c12;--c2:#2c7d59;--c3:#8c4ba6;--c4:#866a00;--c5:#5b6470;--c6:#b83c5b;
--load:#8593a3;--table:#b08a1e;--compute:#1b8a8f;--save:#5f7fb5;--flush:#c93a54;--limit:#c93a54;
color:var(--ink);font:14px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif}
@media (prefers-color-scheme:dark){.stagerun{--ink:#e6edf3;--faint:#9aa4af;--line:#3a424c;--paper:#0f1318;
--panel:#171c22;--band:#1f262e;--c0:#3f7fd0;--c1:#c56a20;--c2:#348c66;--c3:#9a5ab4;--c4:#957805;--c5:#6b7582;
--c6:#c54d6b;--load:#7d8b9b;--table:#c09a2e;--compute:#2aa0a5;--save:#7393c9;--flush:#ef6a80;--limit:#ef6a80}}
.stagerun .chart{display:block;max-width:100%;overflow:visible}
.stagerun .chart text{font-size:11px;fill:var(--ink);font-family:system-ui,"Segoe UI","DejaVu Sans",sans-serif}
.stagerun .chart text.faint{fill:var(--faint)}
.stagerun .chart text.strong{font-weight:600;font-size:12px}
.stagerun .chart text.in{fill:#fff;pointer-events:none}
.stagerun .chart text.over{fill:var(--limit)}
.stagerun .c0{fill:var(--c0)}.stagerun .c1{fill:var(--c1)}.stagerun .c2{fill:var(--c2)}.stagerun .c3{fill:var(--c3)}
.stagerun .c4{fill:var(--c4)}.stagerun .c5{fill:var(--c5)}.stagerun .c6{fill:var(--c6)}
.stagerun .block{stroke:var(--paper);stroke-width:.7}
.stagerun .reserve{stroke:var(--faint);stroke-width:.7}
.stagerun .hatched{fill:var(--band)}
.stagerun .hatching{stroke:var(--faint);stroke-width:1.6}
.stagerun .frame{fill:var(--panel);stroke:var(--line)}
.stagerun .band0{fill:var(--band)}.stagerun .band1{fill:var(--paper)}
.stagerun .grid{stroke:var(--line);stroke-width:1}
.stagerun .limit{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:6 3}
.stagerun .planned{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:2 3}
.stagerun .peak{stroke:var(--ink);stroke-width:2}
.stagerun .used{fill:none;stroke:var(--compute);stroke-width:1.5;stroke-linejoin:round}
.stagerun .area{fill:var(--compute);fill-opacity:.22}
.stagerun .freed{stroke:var(--flush);stroke-width:1.2}.stagerun .mark{fill:var(--flush);fill-opacity:1}
.stagerun .load{fill:var(--load)}.stagerun .table{fill:var(--table)}.stagerun .compute{fill:var(--compute)}
.stagerun .save{fill:var(--save)}.stagerun .flush{fill:var(--flush)}
"""
